"""What modules that stay Python compute by themselves, keeping less.

Graphs are rewritten before they run. A module that could not be traced calls PyTorch's functions as
it always did; while it runs, those of them that something is known about are called in its stead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_da3.ops.recomputed import recomputed
from lightning_da3.ops.sampling import grid_sample
from lightning_da3.ops.softmax import softmax
from lightning_da3.registry import layer_of, replacement_for

SMALL = 4096  # elements; of fewer, PyTorch may keep what it likes

_PRODUCTS = {torch.mul, torch.matmul, torch.bmm, torch.Tensor.mul, torch.Tensor.matmul}
_PRODUCTS |= {torch.Tensor.__mul__, torch.Tensor.__matmul__, torch.Tensor.bmm}
_SOFTMAX = {torch.softmax, F.softmax, torch.Tensor.softmax}


class KeepsLess(TorchFunctionMode):
    """Inside, PyTorch's functions keep little of large tensors for the backward pass.

    ReLU and its family keep bits, pools what `lightning_da3.ops.pooling` keeps, sampling its points
    alone. Unless `exact`, softmax keeps codes of its result and a product of two activations codes
    of both: in groups, so that what is small beside its neighbours alone is rounded much. A fixed
    grid, as that of smooth activations, would round all of what a loss computes of probabilities.
    Everything else, and what writes in place, is as ever.

    Args:
        exact: Only what gives the exact gradient.
    """

    def __init__(self, *, exact: bool) -> None:
        super().__init__()
        self.exact = exact

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call `func`, or what stands for it."""
        del types
        kwargs = kwargs or {}
        if torch.is_grad_enabled() and args and _is_large(args[0]):
            return self._call(func, args, kwargs)
        return func(*args, **kwargs)

    def _call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is F.grid_sample:
            return grid_sample(*args, **kwargs, exact=self.exact)
        if not self.exact and func in _PRODUCTS and _is_product(args) and not kwargs:
            return recomputed(lambda x, y: (func(x, y),), *args)[0]
        if not self.exact and func in _SOFTMAX and _is_softmax(args, kwargs):
            return softmax(args[0], *args[1:], **_without(kwargs, "_stacklevel"))
        layer = _exact_layer(func, args, kwargs)
        return func(*args, **kwargs) if layer is None else layer(args[0])


def _is_large(x: Any) -> bool:
    strided = isinstance(x, Tensor) and x.layout == torch.strided
    return strided and x.requires_grad and x.is_floating_point() and x.numel() >= SMALL


def _is_product(args: tuple[Any, ...]) -> bool:
    return len(args) == 2 and all(map(_is_large, args)) and args[0] is not args[1]


def _is_softmax(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    dim = args[1] if len(args) == 2 else kwargs.get("dim")
    return len(args) <= 2 and isinstance(dim, int)


def _without(kwargs: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key != name}


def _exact_layer(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> nn.Module | None:
    name = getattr(func, "__name__", "")
    method = getattr(Tensor, name, None) is func
    layer = layer_of(name if method else func, args[1:], kwargs)
    found = None if layer is None else replacement_for(layer, exact=True)
    if found is None or found.build is None or found.inplace:
        return None
    return found.build(False)
