"""The network that a model was made from, to tell what fine-tuning it costs."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from torch import nn

from lightning_da3.errors import DA3Error
from lightning_da3.memory import StepPredictor


class Original:
    """A copy of the user's network without values, and so nearly without memory.

    Copies of a model share it; no file holds it.

    Args:
        network: Left unchanged; None: the network is forgotten.

    Attributes:
        network: The copy; None if there is none, or if the network cannot be copied.
    """

    def __init__(self, network: nn.Module | None = None) -> None:
        self.network: nn.Module | None = None
        if network is not None:
            with suppress(DA3Error):  # then only the figures of fine-tuning are missing
                copied = StepPredictor(network).twin
                self.network = copied.requires_grad_(True) if _can_train(copied) else copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Original:
        del memo
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Original, ()


def _can_train(network: nn.Module) -> bool:
    return all(p.is_floating_point() or p.is_complex() for p in network.parameters())
