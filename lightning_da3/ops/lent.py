"""Functions that use the parameters of modules, called again with those of the first time.

`torch.func.functional_call` lends modules other parameters while they are called. What is computed
again in the backward, when they have their own back, is to use the same ones.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


def parameters_of(modules: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """The parameters that modules have now, or are lent."""
    return tuple(p for module in modules for p in module.parameters())


def call_with(
    parameters: Sequence[Tensor],
    modules: Sequence[nn.Module],
    function: Callable[..., Any],
    *args: Any,
) -> Any:
    """``function(*args)``, during which modules have these parameters.

    Args:
        parameters: As many as `parameters_of` gives of the modules, in its order.
        modules: What the function uses.
        function: Anything.
        args: Its arguments.
    """
    now = parameters_of(modules)
    if all(map(operator.is_, now, parameters)):
        return function(*args)
    user = _User(modules)
    lent = dict(zip(now, parameters, strict=True))
    named = {name: lent[parameter] for name, parameter in user.named_parameters()}
    return functional_call(user, named, (function, *args))


class _User(nn.ModuleList):
    """Modules, and whatever uses them."""

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        """``function(*args)``."""
        return function(*args)
