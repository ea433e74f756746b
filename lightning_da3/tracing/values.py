"""What stands for a value while a forward is traced, and answers what it is."""

from __future__ import annotations

import dataclasses
import operator
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from lightning_da3.layers import may_draw
from lightning_da3.torch_private.fake import is_fake
from lightning_da3.tracing.frames import in_checkpoint, may_ask_is
from lightning_da3.tracing.items import may_be_written, with_item
from lightning_da3.tracing.probes import PROBED, SIZE, VARIES

_ONLY_ONES = ("dtype", "layout")  # attributes of which there is one of each, so that `is` tells
_NAMED = (torch.dtype, torch.device, torch.layout, torch.memory_format)
_KEYS = (*_NAMED, torch.Size, bool, int, float, str)  # equal, they are the same key


class Value(fx.Proxy):
    """A proxy that knows what it is on the probes, if its node does.

    It is an instance of what it stands for, writes in place where the user does, and gives numbers
    and truths where Python needs them. The tracer decides whether it may.
    """

    tracer: Any

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # isinstance asks for it
        probed = self.node.meta.get(PROBED) if type(self) is Value else None
        if probed is None or probed[0] is None or in_checkpoint(sys._getframe(1)):
            return type(self)
        return Tensor if is_fake(probed[0]) else type(probed[0])

    def __hash__(self) -> int:  # a dictionary is asked for it
        if issubclass(self.__class__, _KEYS):
            return hash(self.tracer.decided(self))
        return super().__hash__()

    def __getattr__(self, name: str) -> Any:
        probed = self.node.meta.get(PROBED)
        if name in _ONLY_ONES and may_ask_is(sys._getframe(1)):  # a value never is another
            self.tracer.cannot(f"it asks for the {name} of its input, and what `is` the same")
        if probed is not None and not hasattr(probed[0], name):
            raise AttributeError(f"{type(probed[0]).__name__!r} has no attribute {name!r}")
        first = None if probed is None else probed[0]
        structure = first is not None and not isinstance(first, Tensor)
        if structure and getattr(first, name) is None:  # an output that may have more
            return None
        field = Field(self, name)
        if isinstance(first, torch.device) and name == "type":  # PyTorch takes no other
            return self.tracer.decided(field)
        return field

    def __int__(self) -> int:
        return int(self.tracer.decided(self))

    def __float__(self) -> float:
        return float(self.tracer.decided(self))

    def __str__(self) -> str:
        probed = self.node.meta.get(PROBED)
        if probed is not None and isinstance(probed[0], _NAMED):  # the key of many a cache
            return str(self.tracer.decided(self))
        return super().__str__()

    def __index__(self) -> int:
        if self.node.meta.get(VARIES, SIZE):  # PyTorch asks all that may be a size, and goes on
            raise TypeError("it takes a size of its input for a number")
        return operator.index(self.tracer.decided(self))

    def __len__(self) -> int:
        probed = self.node.meta.get(PROBED)
        if probed is not None and not hasattr(probed[0], "__len__"):  # NumPy asks all for it
            raise TypeError(f"object of type {type(probed[0]).__name__!r} has no len()")
        return int(self.tracer.length(self))

    def __contains__(self, item: Any) -> bool:
        return item in self.tracer.decided(self)

    def __round__(self, digits: int | None = None) -> Any:
        return round(self.tracer.decided(self), digits)

    def __setitem__(self, index: Any, value: Any) -> None:
        probed = self.node.meta.get(PROBED)
        if probed is None or not isinstance(probed[0], Tensor) or not may_be_written(index):
            self.tracer.cannot("it writes into a part of a tensor")
        self.tracer.noted(with_item, (self, index, value))


class Field(Value):
    """An attribute of a value, which is a node once it is more than the name of a method."""

    def __init__(self, root: Value, name: str) -> None:
        self.root, self.attr, self.tracer = root, name, root.tracer
        self._node: fx.Node | None = None

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        probed = self.root.node.meta.get(PROBED)
        if probed is None or not hasattr(probed[0], self.attr):
            return Field
        return type(getattr(probed[0], self.attr))

    @property
    def node(self) -> Any:  # type: ignore[override]
        """The node of the attribute."""
        if self._node is None or self._node in self.tracer.erased:
            args = (self.root, self.attr)
            self._node = self.tracer.create_proxy("call_function", getattr, args, {}).node
        return self._node

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A call of the method."""
        return self.tracer.create_proxy("call_method", self.attr, (self.root, *args), kwargs)


_CONSTANTS = (type(None), str, torch.dtype, torch.device)


def structured(proxy: Value) -> Any:
    """A tuple, list or dictionary of values, where a node gives one."""
    probed = proxy.node.meta.get(PROBED)
    return proxy if probed is None else _items(proxy, probed[0])


def _items(proxy: Any, value: Any) -> Any:
    if type(value) in (tuple, list):
        return type(value)(_items(proxy[i], item) for i, item in enumerate(value))
    if type(value) is dict:
        return {key: _items(proxy[key], item) for key, item in value.items()}
    return value if isinstance(value, _CONSTANTS) else proxy


def built_from(value: Any) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments that make a dictionary of a type of its own; None for anything else."""
    if not isinstance(value, dict) or type(value) is dict:
        return None
    kept: Any = value
    if dataclasses.is_dataclass(kept):
        fields = {f.name: getattr(kept, f.name) for f in dataclasses.fields(kept)}
        return (), {name: field for name, field in fields.items() if field is not None}
    return (dict(value),), {}


def is_of_weights(value: Any) -> bool:
    """Whether a value is computed from parameters and buffers alone, and without chance."""
    if not isinstance(value, fx.Proxy):
        return False
    waiting = [value.node]
    for node in waiting:
        known = node.op not in ("placeholder", "call_module")
        if not known or may_draw(node.target, node.args, node.kwargs):
            return False
        waiting += node.all_input_nodes
    return True


def holds(args: Any, kwargs: Any, kind: type) -> bool:
    """Whether one of the arguments of a call is of a type, or holds one that is."""
    found: list[Any] = []
    fx.node.map_aggregate((args, kwargs), lambda a: found.append(a) if isinstance(a, kind) else a)
    return bool(found)


# what `x += y` is where x is a tensor, and where it is a number
IN_PLACE: dict[Callable[..., Any], Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ifloordiv: operator.floordiv,
    operator.imod: operator.mod,
    operator.ipow: operator.pow,
    operator.iand: operator.and_,
    operator.ior: operator.or_,
    operator.ixor: operator.xor,
    operator.ilshift: operator.lshift,
    operator.irshift: operator.rshift,
    operator.imatmul: operator.matmul,
}


def _in_place(writing: Callable[..., Any], plain: Callable[..., Any]) -> Any:
    def method(self: Value, other: Any) -> Any:
        probed = self.node.meta.get(PROBED)
        number = probed is not None and not isinstance(probed[0], Tensor)
        # there is no tensor to write into: Python has no x @= y of tensors, either
        function = plain if number or writing is operator.imatmul else writing
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _writing, _plain in IN_PLACE.items():
    setattr(Value, f"__{_writing.__name__}__", _in_place(_writing, _plain))
