"""Convolutions of ONNX as runtimes are fast at them, and their kernels once in a file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lightning_da3.exporting.lowering import TURNED
from lightning_da3.exporting.onnx_passes.nodes import Nodes


class _Geometry(NamedTuple):
    """Of a transposed convolution, one number an axis; `begin` and `end` are its padding."""

    stride: list[int]
    dilation: list[int]
    begin: list[int]
    end: list[int]
    rest: list[int]

    @classmethod
    def of(cls, node: Any, axes: int) -> _Geometry | None:
        """None: it says something else."""
        given = node.attributes
        padded = "auto_pad" in given and given["auto_pad"].value != "NOTSET"
        if padded or "output_shape" in given:
            return None

        def numbers(name: str, otherwise: int, count: int) -> list[int]:
            return list(given[name].as_ints()) if name in given else [otherwise] * count

        pads = numbers("pads", 0, 2 * axes)
        return cls(
            numbers("strides", 1, axes),
            numbers("dilations", 1, axes),
            pads[:axes],
            pads[axes:],
            numbers("output_padding", 0, axes),
        )


_ADAPTED = (["Conv", "Resize"], ["Conv", "Conv"])  # a host, and what its adapter adds


def convolve_transposed_(model: Any, constant: set[int], *, strided: bool) -> None:
    """Transposed convolutions become convolutions, where that is faster.

    ::

        ConvTranspose(x, w)             becomes   Conv(x, turned w)           of stride 1
        ConvTranspose(x, w, stride s)   becomes   Conv(zeros between x, turned w)   depthwise
                                        becomes   zeros between Conv(x, turned w)   of single pixels

    Runtimes are up to ten times faster at that. Turned, a kernel has its sides turned around and
    its channels swapped; they do that when they load the file, so it lies there once, although
    forward and backward read it. Kernels that are no constants are turned in every run: only those
    of single pixels.

    Args:
        model: An ir model, edited in place.
        constant: Values that no input decides.
        strided: Also those of other strides. Where a value is infinite or no number, those that lie
            beside it are NaN then: for training steps, which such a value ends anyway.
    """
    for node in list(model.graph):
        if node.op_type == "ConvTranspose":
            _convolve_(model, node, id(node.inputs[1]) in constant, strided)


def _convolve_(model: Any, node: Any, constant: bool, strided: bool) -> None:
    x, weight, *bias = node.inputs
    sides = [] if weight.shape is None else list(weight.shape)[2:]
    how = _Geometry.of(node, len(sides))
    if how is None or not all(isinstance(n, int) for n in weight.shape or [None]):
        return
    groups = node.attributes["group"].as_int() if "group" in node.attributes else 1
    reach = [d * (k - 1) for d, k in zip(how.dilation, sides, strict=True)]
    begin = [r - p for r, p in zip(reach, how.begin, strict=True)]
    end = [r - p + o for r, p, o in zip(reach, how.end, how.rest, strict=True)]
    spread = max(how.stride, default=1) > 1
    single = math.prod(sides) == 1 and not any(how.begin + how.end)
    if not constant and not single:
        return
    if spread:
        known = x.shape is not None and all(isinstance(n, int) for n in list(x.shape)[1:])
        depthwise = groups == weight.shape[0] and weight.shape[1] == 1
        floats = x.dtype is not None and x.dtype.name == "FLOAT"
        fast = not bias if single else depthwise  # a bias is added to the zeros, too
        if not strided or not known or not floats or len(sides) != 2 or not fast:
            return
        # zeros fill whole strides: some lie behind the last pixel already
        end = [e - s + 1 for e, s in zip(end, how.stride, strict=True)]
    if min(begin + end, default=0) < 0 or (spread and single and any(end)):
        return
    nodes = Nodes(model, node.outputs[0].name)
    attributes = {"dilations": how.dilation, "group": groups, "pads": begin + end}
    turned = _turned(nodes, weight, groups)
    if spread and not single:
        x = _between_zeros(nodes, x, list(x.shape), how.stride)
    y = nodes.call("Conv", x, turned, *bias, **attributes)
    if spread and single:
        size = [*list(x.shape)[:1], groups * weight.shape[1], *list(x.shape)[2:]]
        y = _between_zeros(nodes, y, size, how.stride)
    nodes.replace(node, y)


def _turned(nodes: Nodes, weight: Any, groups: int) -> Any:
    taken, given, *sides = weight.shape  # of channels: all that go in, and those out of a group
    pixels = math.prod(sides)
    value = nodes.call("Reshape", weight, nodes.constant([groups, taken // groups, given, pixels]))
    value = nodes.call("Transpose", value, perm=[0, 2, 1, 3])
    return _reversed(nodes, value, 3, [groups * given, taken // groups, *sides], weight.dtype)


def _reversed(nodes: Nodes, value: Any, axis: int, shape: list[int], dtype: Any) -> Any:
    """Kernels whose pixels lie along one axis, the other way round, in their shape."""
    pixels = math.prod(shape[2:])
    if pixels > 1:
        value = nodes.call("Gather", value, nodes.constant([*range(pixels)][::-1]), axis=axis)
    value = nodes.call("Reshape", value, nodes.constant(shape))
    for made in nodes.made:
        made.outputs[0].dtype = dtype
    return value


def _between_zeros(nodes: Nodes, x: Any, shape: Sequence[Any], stride: Sequence[int]) -> Any:
    """Every pixel in a block of zeros, at its first place: copies of it, all but one times zero.

    ONNX Runtime is four times faster at that than at a condition.
    """
    factors = np.array([1.0, 1.0, *stride], np.float32)
    copies = nodes.call(
        "Resize",
        x,
        None,
        nodes.constant(factors),
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )
    sides = [n * s for n, s in zip(shape[2:], stride, strict=True)]
    first = np.zeros(sides, np.float32)
    first[:: stride[0], :: stride[1]] = 1.0
    name = f"first_of_{stride}_in_{sides}"
    between = nodes.call("Mul", copies, nodes.constant(first, name))
    for value in (copies, between):
        value.shape, value.dtype = nodes.ir.Shape([*shape[:2], *sides]), nodes.ir.DataType.FLOAT
    return between


# --- what is added to them


def add_residual_first_(model: Any) -> None:
    """Add to a convolution what has its own size before what an adapter adds.

    ::

        (Conv + Resize(addend)) + x   becomes   (Conv + x) + Resize(addend)

    Runtimes join the first sum with the convolution, as in the user's own network.

    Args:
        model: An ir model with shapes, edited in place.
    """
    for node in list(model.graph):
        parts = _sum_of_three(node) if node.op_type == "Add" else None
        if parts is None:
            continue
        conv, addend, residual = parts
        inner, nodes = addend.uses()[0].node, Nodes(model, f"{node.outputs[0].name}.sum")
        first = nodes.call("Add", conv, residual)
        first.shape, first.dtype = conv.shape, conv.dtype
        nodes.replace(node, nodes.call("Add", first, addend))
        model.graph.remove(inner, safe=True)


def _sum_of_three(node: Any) -> tuple[Any, Any, Any] | None:
    """A convolution, what an adapter adds to it and what is added then; None: it is another sum."""
    for between, residual in (node.inputs, node.inputs[::-1]):
        inner = between.producer()
        if inner is None or inner.op_type != "Add":
            continue
        if len(between.uses()) > 1 or between.is_graph_output():
            continue
        for conv, addend in (inner.inputs, inner.inputs[::-1]):
            made = [v.producer() for v in (conv, addend)]
            kinds = [None if n is None else n.op_type for n in made]
            alone = len(addend.uses()) == 1 and residual.shape == conv.shape
            if kinds in _ADAPTED and alone and conv.shape is not None:
                return conv, addend, residual
    return None


# --- kernels that lie there twice


def turn_at_loading_(model: Any) -> None:
    """Let runtimes turn the kernels that `lightning_da3.exporting.lowering` turned around.

    Args:
        model: An ir model, edited in place.
    """
    held = model.graph.initializers
    first = next(iter(model.graph), None)
    for name in [n for n in held if n.endswith(TURNED)]:
        turned, weight = held[name], held.get(name.removesuffix(TURNED))
        if weight is None or weight.const_value is None or len(weight.shape) < 3:
            continue
        if weight.is_graph_input() or turned.is_graph_output():
            continue
        values, axes = weight.const_value.numpy(), tuple(range(2, len(weight.shape)))
        if not np.array_equal(np.flip(values, axes), turned.const_value.numpy()):
            continue
        shape, pixels = list(weight.shape), math.prod(list(weight.shape)[2:])
        nodes = Nodes(model, f"{name}_again")
        value = nodes.call("Reshape", weight, nodes.constant([-1, pixels]))
        value = _reversed(nodes, value, 1, shape, weight.dtype)
        value.shape = weight.shape
        turned.replace_all_uses_with(value)
        model.graph.insert_before(first, nodes.made)
        del held[name]
