"""What modules that stay Python compute by themselves, keeping less.

Graphs are rewritten before they run. A module that could not be traced calls PyTorch's functions as
it always did; while it runs, those of them that something is known about are called in its stead.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_da3.errors import ConversionError
from lightning_da3.layers import (
    copying_name,
    facts_of_function,
    layer_of,
    may_draw,
    replacement_for,
    without_chance,
    writes,
)
from lightning_da3.ops.arithmetic import Arithmetic
from lightning_da3.ops.recomputed import recomputed
from lightning_da3.ops.sampling import grid_sample
from lightning_da3.ops.softmax import softmax
from lightning_da3.torch_private.autograd import is_checkpointed

SMALL = 4096  # elements; of fewer, PyTorch may keep what it likes


class KeepsLess(TorchFunctionMode):
    """Inside, PyTorch's functions keep little of large tensors for the backward pass.

    ReLU and its family keep bits, pools what `lightning_da3.ops.pooling` keeps, sampling its points
    alone. Unless `exact`, softmax keeps codes of its result and a product of two activations codes
    of both: in groups, so that what is small beside its neighbours alone is rounded much. A fixed
    grid, as that of smooth activations, would round all of what a loss computes of probabilities.
    Arithmetic on what is kept already keeps nothing more: its operands are computed again.
    Views that channels_last maps do not have are copies. Dropout that follows ``self.training`` is
    off: the backbone is held in eval. Everything else, and what writes in place, is as ever.

    Args:
        exact: Only what gives the exact gradient.
    """

    def __init__(self, *, exact: bool) -> None:
        super().__init__()
        self.exact = exact
        self._copies = WeakTensorKeyDictionary()  # that stand for views
        self._arithmetic = Arithmetic(SMALL)

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
        if getattr(func, "__name__", "") in _DROPS and may_draw(func, args, kwargs):
            return _held_in_eval(func, args, kwargs)
        if copying_name(func):
            return self._viewed(func, args, kwargs)
        if self._copies and args and writes(func) and args[0] in self._copies:
            raise ConversionError(_WRITES_INTO_A_COPY.format(func.__name__, args[0].shape))
        if not torch.is_grad_enabled() or not args or is_checkpointed():  # again without this mode
            return func(*args, **kwargs)
        return self._arithmetic.called(func, args, kwargs, self._call)

    def _call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not _is_large(args[0]):
            return func(*args, **kwargs)
        if func is F.grid_sample:
            return grid_sample(*args, **kwargs)
        if not self.exact and _multiplies(func) and _is_product(args) and not kwargs:
            return recomputed(lambda x, y: (func(x, y),), *args)[0]
        softens = facts_of_function(func).does == "softmax"
        if not self.exact and softens and _is_softmax(args, kwargs):
            return softmax(args[0], *args[1:], **_without(kwargs, "_stacklevel"))
        layer = _exact_layer(func, args, kwargs)
        return func(*args, **kwargs) if layer is None else layer(args[0])

    def _viewed(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A view, or a copy where the map is channels_last and a contiguous one has the view."""
        try:
            return func(*args, **kwargs)
        except RuntimeError:
            if any(isinstance(a, torch.dtype) for a in (*args, *kwargs.values())):
                raise
            copied = getattr(Tensor, copying_name(func))(*args, *kwargs.values())
            self._copies[copied] = None
            return copied


_WRITES_INTO_A_COPY = (
    "`{}` writes through a view of shape {} into a map that lies channels_last in memory, where "
    "there is no such view. Write into the map itself, or view `x.contiguous()`."
)


# functions of PyTorch that drop at random if an argument says so
_DROPS = frozenset(
    "dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout "
    "rrelu scaled_dot_product_attention multi_head_attention_forward".split()
)


def _held_in_eval(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function that drops; nothing is dropped if its caller asks for its mode."""
    off = without_chance(func, args, kwargs) if _caller_asks_for_its_mode() else None
    return func(*args, **kwargs) if off is None else func(**off)


def _caller_asks_for_its_mode() -> bool:
    """Whether the function that calls PyTorch's now reads an attribute named `training`."""
    frame = inspect.currentframe()
    while frame is not None:
        home = str(frame.f_globals.get("__name__", ""))
        if home.startswith("torch.nn.modules.") or not home.startswith(("torch.", "lightning_da3")):
            return "training" in frame.f_code.co_names
        frame = frame.f_back
    return False


def _is_large(x: Any) -> bool:
    if not isinstance(x, Tensor) or x.layout != torch.strided or not x.is_floating_point():
        return False
    return x.requires_grad and x.numel() >= SMALL


def _multiplies(func: Callable[..., Any]) -> bool:
    return facts_of_function(func).does == "product" and not writes(func)


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
    layer = layer_of(func, args[1:], kwargs)
    found = None if layer is None else replacement_for(layer, exact=True)
    if found is None or found.build is None or found.inplace:
        return None
    return found.build(False)
