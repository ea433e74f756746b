"""What every value of a graph is on two inputs without values, which differ in their sizes.

What is the same on both does not depend on how many samples there are, nor on how large: a forward
that asks for it gets its answer once and for all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_da3.layers import facts_of, facts_of_call
from lightning_da3.memory.fake import quiet
from lightning_da3.memory.names import mutable
from lightning_da3.torch_private.autograd import storage_key, version_of
from lightning_da3.torch_private.fake import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    is_fake,
)
from lightning_da3.torch_private.trees import tree_leaves, tree_map_only

PROBED = "probed"  # key of a node's meta: its values on the probes
VARIES = "varies"  # key of a node's meta: what a number depends on: "", SIZE or STATE
SIZE, STATE = "size", "state"
# of tensors, and other at another time: in lower precision, on another device
_STATES = (
    *("dtype", "device", "type", "layout", "stride", "is_contiguous", "storage_offset", "data_ptr"),
    *("is_cuda", "is_cpu", "is_mps", "requires_grad", "grad_fn", "is_leaf", "grad"),
    *("element_size", "itemsize", "nbytes", "storage", "untyped_storage", "storage_type"),
)
_VALUES = ("numpy", "tolist", "item", "__array__")  # of tensors: nothing that a probe has
UNKNOWN = (DataDependentOutputException, DynamicOutputShapeException, NotImplementedError)


class ProbeFailed(BaseException):  # no error of a user's forward
    """A network does not take a probe's input.

    Args:
        number: Of the probe.
        error: What the network said.
    """

    def __init__(self, number: int, error: BaseException) -> None:
        super().__init__(str(error))
        self.number = number


class SizeDecides(BaseException):  # no error of a user's forward
    """A forward does something else on the larger probe, which could be checked in every call."""


class Probes:
    """Runs nodes on inputs without values.

    Args:
        inputs: By probe, the arguments of the network, without values.
        mode: The mode of fake tensors.

    Attributes:
        alike: Whether they differ in how many samples there are alone: then nobody knows which
            numbers are others for larger ones.
    """

    def __init__(self, inputs: Sequence[Sequence[Any]], mode: AbstractContextManager[Any]) -> None:
        self.mode = mode
        self.alike = _sizes_of_one(inputs[0]) == _sizes_of_one(inputs[-1])
        with mode:
            self.inputs = [
                [tree_map_only(Tensor, _without_values, x) for x in probe] for probe in inputs
            ]
        self.at_work = False
        self._next = 0

    def afresh(self) -> Probes:
        """The same, before the first node."""
        self._next = 0
        return self

    def run(self, node: fx.Node, root: nn.Module) -> None:
        """Note a new node's values; nothing, if they are not known.

        Raises:
            ProbeFailed: It refuses its arguments.
        """
        if node.op == "placeholder":
            self._take(node)
            return
        if node.target in _VALUES or any(PROBED not in i.meta for i in node.all_input_nodes):
            return
        try:
            results = [self._run(node, root, number) for number in range(len(self.inputs))]
        except UNKNOWN:
            return
        node.meta[PROBED] = tuple(results)
        node.meta[VARIES] = _varies(node, results, self.alike)

    def _take(self, node: fx.Node) -> None:
        if str(node.target).startswith("*"):
            return
        values = [i[self._next] if self._next < len(i) else None for i in self.inputs]
        if self._next >= len(self.inputs[0]):
            if not node.args:
                return
            values = [node.args[0] for _ in self.inputs]
        self._next += 1
        node.meta[PROBED] = tuple(values)
        node.meta[VARIES] = "" if _hold_tensors(values) or _same(values) else SIZE

    def _run(self, node: fx.Node, root: nn.Module, number: int) -> Any:
        def probed(n: fx.Node) -> Any:
            return n.meta[PROBED][number]

        args = mutable(fx.map_arg(node.args, probed))
        kwargs = mutable(fx.map_arg(node.kwargs, probed))
        self.at_work = True
        try:
            with quiet(), torch.no_grad(), self.mode:
                return _call(node, root, args, kwargs)
        except UNKNOWN:
            raise
        except Exception as error:
            raise ProbeFailed(number, error) from error
        finally:
            self.at_work = False


def _without_values(x: Tensor) -> Tensor:
    if is_fake(x):
        return x
    place = "cpu" if x.device.type == "meta" else x.device
    return torch.empty(x.shape, dtype=x.dtype, device=place)


def _call(node: fx.Node, root: nn.Module, args: Any, kwargs: Any) -> Any:
    if node.op == "get_attr":
        value: Any = root
        for name in str(node.target).split("."):
            value = getattr(value, name)
        return value
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if node.op == "call_function":
        function: Callable[..., Any] = node.target  # type: ignore[assignment]
        return function(*args, **kwargs)
    return call_layer(root.get_submodule(str(node.target)), args, kwargs)


def call_layer(layer: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """What a layer gives for values without values, in short where that is known.

    Fake tensors take norms apart, and run every step of recurrent layers.
    """
    x = args[0] if args else None
    if type(layer) is nn.MultiheadAttention and _gives_queries(layer, args, kwargs):
        return torch.empty_like(args[0]), None
    if not isinstance(x, Tensor) or kwargs or len(args) > 1:
        return layer.forward(*args, **kwargs)
    if facts_of(layer).elementwise or type(layer) is nn.LayerNorm:
        return x.view_as(x) if getattr(layer, "inplace", False) else torch.empty_like(x)
    if type(layer) is nn.Linear and x.shape[-1:] == (layer.in_features,):
        return x.new_empty(*x.shape[:-1], layer.out_features)
    if not (isinstance(layer, nn.RNNBase) and x.dim() == 3):
        return layer.forward(x)
    axis = 1 if layer.batch_first else 0
    size = [-1, -1, -1]
    size[axis] = x.shape[axis]
    y, state = layer.forward(x.narrow(axis, 0, 1))
    return y.expand(size), state


def _gives_queries(layer: nn.MultiheadAttention, args: Sequence[Any], kwargs: Any) -> bool:
    """Whether what an attention gives is shaped like its queries, without weights beside it."""
    sizes = [layer.embed_dim, layer.kdim, layer.vdim]
    return (
        kwargs.keys() == {"need_weights"}
        and kwargs["need_weights"] is False
        and [x.shape[-1] if isinstance(x, Tensor) else None for x in args] == sizes
        and args[0].dim() == args[1].dim() == args[2].dim()
    )


def _varies(node: fx.Node, results: Sequence[Any], alike: bool) -> str:
    """What a value that is no tensor depends on."""
    if _hold_tensors(results):
        return ""
    same = "" if _same(results) and not alike else SIZE
    name = node.args[1] if node.target is getattr else node.target
    source = node.args[0] if node.args else None
    if isinstance(source, fx.Node) and isinstance(source.meta[PROBED][0], Tensor):
        if name in _STATES:
            return STATE
        if facts_of_call(node).gives_number or node.target is getattr:
            return same
    sized = isinstance(source, fx.Node) and isinstance(source.meta[PROBED][0], torch.Size)
    if sized and getattr(node.target, "__name__", "") in ("getitem", "len"):
        return same
    kinds: list[str] = [i.meta.get(VARIES, "") for i in node.all_input_nodes]
    return max([*kinds, same], key=len)


def _hold_tensors(values: Sequence[Any]) -> bool:
    """Whether values are tensors or hold some, in a structure of the user's maybe."""
    kinds = (Tensor, dict)  # a leaf that is a dictionary is of a type of its own
    return any(
        isinstance(leaf, kinds) or dataclasses.is_dataclass(leaf) for leaf in tree_leaves(values)
    )


def _same(results: Sequence[Any]) -> bool:
    try:
        return all(bool(result == results[0]) for result in results)
    except Exception:  # noqa: BLE001  # the user's own kind of value
        return False


def is_written(node: fx.Node) -> bool:
    """Whether a call gave its first argument, into which it wrote, and not what reads it."""
    first = node.args[0] if node.args else None
    if not isinstance(first, fx.Node):
        return False
    pairs = zip(node.meta[PROBED], first.meta[PROBED], strict=True)
    return all(result is argument for result, argument in pairs)


def storages(value: Any) -> Iterator[int]:
    """Keys of the memory that a value without values would lie in."""
    if is_fake(value):
        yield storage_key(value.untyped_storage())
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from storages(item)


def versions(value: Any) -> list[int]:
    """How often something was written into each tensor of a value."""
    if is_fake(value):
        return [version_of(value)]
    if isinstance(value, (tuple, list)):
        return [version for item in value for version in versions(item)]
    return []


def probe_inputs(inputs: Sequence[Any]) -> Iterator[list[list[Any]]]:
    """Pairs of inputs to try: more samples and larger ones, more alone, and the same twice.

    Args:
        inputs: The arguments of a network, without values.
    """
    count = next((x.shape[0] for x in inputs if isinstance(x, Tensor) and x.dim()), 0)

    def with_sizes(axes: Callable[[Tensor], dict[int, int]], more: int) -> list[Any]:
        def sized(x: Any) -> Any:
            if not isinstance(x, Tensor) or x.dim() == 0:
                return x
            size = [*x.shape]
            size[0] += more if size[0] == count else 0
            for axis, added in axes(x).items():
                size[axis] += added
            return x.new_empty(size)

        return [sized(x) for x in inputs]

    def spatial(x: Tensor) -> dict[int, int]:
        return dict.fromkeys(range(2, x.dim()), 33)

    def tokens(x: Tensor) -> dict[int, int]:
        of_tokens = x.dim() == 3 or (x.dim() == 2 and not x.is_floating_point())
        return {1: 13} if of_tokens else spatial(x)

    def doubled(x: Tensor) -> dict[int, int]:  # of a network that divides by its strides
        return {axis: x.shape[axis] for axis in range(2, x.dim())}

    first = with_sizes(lambda _: {}, 1)
    tried: list[list[Any]] = []
    ways: tuple[Callable[[Tensor], dict[int, int]], ...] = (tokens, spatial, doubled, lambda _: {})
    for axes in ways:
        second = with_sizes(axes, 2)
        if not any(_sizes(second) == _sizes(other) for other in tried):
            tried.append(second)
            yield [first, second]
    yield [first, first]


def _sizes_of_one(inputs: Sequence[Any]) -> list[Any]:
    return [x.shape[1:] for x in inputs if isinstance(x, Tensor)]


def _sizes(inputs: Sequence[Any]) -> list[Any]:
    return [x.shape for x in inputs if isinstance(x, Tensor)]
