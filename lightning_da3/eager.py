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
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_da3.errors import ConversionError
from lightning_da3.layers import copying_name, facts_of_function, layer_of, replacement_for, writes
from lightning_da3.ops.derived import Derived, Root, from_roots
from lightning_da3.ops.recomputed import recomputed
from lightning_da3.ops.sampling import grid_sample
from lightning_da3.ops.softmax import softmax

SMALL = 4096  # elements; of fewer, PyTorch may keep what it likes
LONGEST = 32  # functions that are called to compute an operand again


def _called(*names: str) -> set[Callable[..., Any]]:
    places = (torch, F, Tensor)
    return {getattr(place, name) for name in names for place in places if hasattr(place, name)}


# elementwise, by what PyTorch keeps of them
_SUMS = _called("add", "__add__", "__radd__", "sub", "__sub__", "__rsub__", "rsub", "neg")
_TIMES = _called("mul", "__mul__", "__rmul__")
_KEEP_RESULT = _called("sigmoid", "tanh", "exp")
_KEEP_OPERANDS = _called("pow", "__pow__", "log", "binary_cross_entropy_with_logits")
_ELEMENTWISE = _SUMS | _TIMES | _KEEP_RESULT | _KEEP_OPERANDS


class KeepsLess(TorchFunctionMode):
    """Inside, PyTorch's functions keep little of large tensors for the backward pass.

    ReLU and its family keep bits, pools what `lightning_da3.ops.pooling` keeps, sampling its points
    alone. Unless `exact`, softmax keeps codes of its result and a product of two activations codes
    of both: in groups, so that what is small beside its neighbours alone is rounded much. A fixed
    grid, as that of smooth activations, would round all of what a loss computes of probabilities.
    What follows by elementwise functions from tensors that are kept anyway is not kept as well, but
    computed again: a focal loss keeps its logits, their sigmoid and its targets, of eight
    tensors. Views that channels_last maps do not have are copies. Everything else, and what writes
    in place, is as ever.

    Args:
        exact: Only what gives the exact gradient.
    """

    def __init__(self, *, exact: bool) -> None:
        super().__init__()
        self.exact = exact
        self._lineage = _Lineage()
        self._copies = WeakTensorKeyDictionary()  # that stand for views

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
        if copying_name(func):
            return self._viewed(func, args, kwargs)
        if self._copies and args and writes(func) and args[0] in self._copies:
            raise ConversionError(_WRITES_INTO_A_COPY.format(func.__name__, args[0].shape))
        if not torch.is_grad_enabled() or not args:
            return func(*args, **kwargs)
        if func in _ELEMENTWISE and _is_elementwise(func, args, kwargs):
            return self._elementwise(func, args, kwargs)
        return self._call(func, args, kwargs) if _is_large(args[0]) else func(*args, **kwargs)

    def _elementwise(
        self, func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        derived = Derived(func, tuple(map(self._lineage.origin, args)), kwargs)
        operands = tuple(arg for arg in args if isinstance(arg, Tensor))
        roots = self._lineage.kept(derived) if self._lineage.would_add(func, operands) else None
        if roots is not None:
            y = from_roots(derived, operands, roots)
        elif not self.exact and _multiplies(func) and _is_product(args):
            return self._call(func, args, kwargs)  # type: ignore[no-any-return]
        else:
            y = func(*args, **kwargs)
            self._lineage.keep(_kept_by(func, operands, y))
            derived = Derived(func, tuple(map(self._lineage.origin, args)), kwargs)
        self._lineage.note(y, derived)
        return y

    def _call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is F.grid_sample:
            return grid_sample(*args, **kwargs, exact=self.exact)
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


class _Lineage:
    """Which tensors autograd keeps, and which others follow from them."""

    def __init__(self) -> None:
        self._origins = WeakTensorKeyDictionary()  # origins and versions
        self._kept: dict[Root, Tensor] = {}

    def origin(self, x: Any) -> Any:
        """Where a tensor comes from; of itself, if nothing else is known. Numbers: themselves."""
        if not isinstance(x, Tensor):
            return x
        if x in self._origins:
            origin, version = self._origins[x]
            if version == x._version:
                return origin
        root = Root(x)
        self._origins[x] = root, x._version
        return root

    def note(self, y: Tensor, derived: Derived) -> None:
        """`y` is what `derived` says; unless it is kept, or too far from what is."""
        if y not in self._origins and derived.functions <= LONGEST:
            self._origins[y] = derived, y._version

    def keep(self, tensors: Iterable[Tensor]) -> None:
        """Autograd keeps these as they are."""
        for x in tensors:
            root = self.origin(x)
            if not isinstance(root, Root):
                root = Root(x)
                self._origins[x] = root, x._version
            self._kept[root] = x

    def kept(self, derived: Derived) -> tuple[Tensor, ...] | None:
        """The roots of `derived`, if autograd keeps all of them, unchanged."""
        roots = [root.tensor if root in self._kept else None for root in derived.roots]
        found = tuple(root for root in roots if root is not None)
        return found if len(found) == len(roots) else None

    def would_add(self, func: Callable[..., Tensor], operands: tuple[Tensor, ...]) -> bool:
        """Whether PyTorch would keep a tensor that follows from others."""
        if not any(x.requires_grad for x in operands):
            return False
        derived = [x for x in operands if isinstance(self.origin(x), Derived)]
        if func in _KEEP_RESULT:
            return bool(derived)
        kept = _kept_by(func, operands, operands[0])
        return any(x is other for x in derived for other in kept)


def _kept_by(
    func: Callable[..., Tensor], operands: tuple[Tensor, ...], y: Tensor
) -> tuple[Tensor, ...]:
    """What PyTorch keeps of an elementwise function for its gradient."""
    if not any(x.requires_grad for x in operands):
        return ()
    if func in _KEEP_RESULT:
        return (y,)
    if func in _TIMES and len(operands) == 2:
        pairs = zip(operands, reversed(operands), strict=True)
        return tuple(x for x, other in pairs if other.requires_grad)
    return operands if func in _KEEP_OPERANDS else ()


def _is_elementwise(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool:
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    known = all(type(x) in (Tensor, nn.Parameter) and not x.is_inference() for x in tensors)
    large = any(_is_strided(x) and x.numel() >= SMALL for x in tensors)
    if not (known and large) or any(isinstance(value, Tensor) for value in kwargs.values()):
        return False
    if "binary" in func.__name__:
        return kwargs.get("reduction") == "none" and len(args) == len(tensors) == 2
    return "pow" not in func.__name__ or len(tensors) == 1


def _is_strided(x: Any) -> bool:
    return isinstance(x, Tensor) and x.layout == torch.strided and x.is_floating_point()


def _is_large(x: Any) -> bool:
    return _is_strided(x) and x.requires_grad and x.numel() >= SMALL


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
