"""What a graph checks in every call: that what its tracing decided still holds."""

from __future__ import annotations

from typing import Any

from torch.fx.node import has_side_effect

from lightning_da3.errors import InputError
from lightning_da3.layers import register


def must_be_default(value: Any, name: str, default: Any) -> None:
    """Refuse an argument that the traced forward branches on.

    Raises:
        InputError: It is not what it is by default.
    """
    if value is not default and value != default:
        raise InputError(
            f"`{name}` was traced as {default!r}, which the network's forward branches on. To use "
            f"it, convert a module whose forward always passes `{name}` on to the network."
        )


def must_be(value: Any, decided: Any, place: str) -> None:
    """Refuse an input for which the traced forward would have taken another branch.

    Raises:
        InputError: It is not what it was.
    """
    if value != decided:
        raise InputError(
            f"The network's forward decides on the sizes of its input ({place}). It was traced "
            f"where that is {decided!r}, and here it is {value!r}. Convert the network with "
            "`example_inputs` like this input, or put what decides into a module of its own, which "
            "then stays Python."
        )


for _guard in (must_be_default, must_be):
    register(_guard, keeps="nothing", pure=True)
    has_side_effect(_guard)  # dead code elimination leaves them
