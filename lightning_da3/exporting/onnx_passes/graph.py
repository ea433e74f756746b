"""What becomes of a graph of ONNX before it is a file: simpler, faster, and how much it holds."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

from lightning_da3.errors import ConversionError
from lightning_da3.exporting.onnx_passes.bits import pack_in_integers_
from lightning_da3.exporting.onnx_passes.convolutions import (
    add_residual_first_,
    convolve_transposed_,
    turn_at_loading_,
)
from lightning_da3.exporting.onnx_passes.order import keep_before_going_on_
from lightning_da3.exporting.onnx_passes.products import multiply_directly_, pool_before_padding_
from lightning_da3.exporting.onnx_passes.scalars import shape_scalars_

OPSET = 20
LOSS = "loss"  # what a training step's file calls it

# results that lie where the first operand does, and those that can take a dying operand's memory
_VIEWS = {"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"}
_IN_PLACE = set(
    "Abs Add Ceil Clip Cos Div Elu Erf Exp Floor HardSigmoid HardSwish LeakyRelu Log Mul Neg Not "
    "Pow Reciprocal Relu Round Selu Sigmoid Sign Sin Softplus Sqrt Sub Tanh".split()
)


def simplify_(model: Any, outputs: Sequence[str]) -> None:
    """What torch's own optimizer of graphs does to an ir model, without what changes results.

    Torch also leaves in every node the files and lines that it came from.

    Args:
        model: Edited in place.
        outputs: Names of what comes out; a training step's loss and what else.
    """
    optimizer: Any = importlib.import_module("onnxscript.optimizer")
    optimizer.inline(model)
    multiply_directly_(model)
    optimizer.fold_constants(model)
    for name in ("RemoveUnusedNodes", "RemoveUnusedFunctions"):
        _passed(name, model)
    pool_before_padding_(model)
    convolve_transposed_(model, constants_of(model), strided=LOSS in outputs)
    add_residual_first_(model)
    turn_at_loading_(model)
    pack_in_integers_(model)
    shape_scalars_(model)
    _passed("RemoveUnusedNodes", model)
    _passed("ShapeInference", model)
    if LOSS in outputs:
        keep_before_going_on_(model, LOSS, constants_of(model))
        _passed("ShapeInference", model)
    _passed("DeduplicateInitializers", model)
    _passed("ClearMetadataAndDocString", model)


def _passed(name: str, model: Any) -> None:
    passes: Any = importlib.import_module("onnx_ir.passes.common")
    getattr(passes, f"{name}Pass")()(model)


def standard_operations(model: Any) -> list[str]:
    """The operations of a model, all of ONNX itself: every runtime has those, and no others.

    Raises:
        ConversionError: There are others.
    """
    used = {(node.domain, node.op_type) for graph in graphs_in(model.graph) for node in graph.node}
    others = sorted(f"{domain}::{kind}" for domain, kind in used if domain or not _known(kind))
    others += [f"{f.domain}::{f.name}" for f in model.functions]
    others += [f"{o.domain} (opset {o.version})" for o in model.opset_import if o.domain]
    if others:
        raise ConversionError(
            f"ONNX has no operations {others}: the network cannot be exported to it. Write "
            "format='pt2', or replace the layers that use them."
        )
    return sorted(kind for _, kind in used)


def graphs_in(graph: Any) -> Iterator[Any]:
    """A graph, and the graphs in its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            own = [attribute.g] if attribute.HasField("g") else []
            for inner in (*own, *attribute.graphs):
                yield from graphs_in(inner)


def _known(kind: str) -> bool:
    """Whether ONNX has an operation in this opset."""
    onnx: Any = importlib.import_module("onnx")
    try:
        return not onnx.defs.get_schema(kind, OPSET, "").deprecated
    except onnx.defs.SchemaError:
        return False


# --- memory


def planned_peak_bytes(model: Any) -> int | None:
    """The most bytes that tensors which are no constants hold at once, in the order of the graph.

    Counted are what goes in, for the whole run, what comes out, and what lies between; for one
    operation what it reads and what it gives. Views take no memory, and an element-wise operation
    takes that of an operand which nothing reads afterwards.

    Args:
        model: An ir model, with shapes.

    Returns:
        Bytes; None: the shapes are not fixed.
    """
    constant, inputs = constants_of(model), [id(v) for v in model.graph.inputs]
    nodes = [n for n in model.graph if any(id(v) not in constant for v in n.outputs)]
    home = {v: v for v in inputs}  # of every value the one whose memory it lies in
    last: dict[int, float] = dict.fromkeys(inputs, math.inf)  # where it is read
    for i, node in enumerate(nodes):
        read = [home[id(v)] for v in node.inputs if id(v) in home]
        for v in node.outputs:
            home[id(v)] = read[0] if read and node.op_type in _VIEWS else id(v)
        for h in (*read, *(home[id(v)] for v in node.outputs)):
            last[h] = max(last.get(h, i), i)
    last.update({home[id(v)]: math.inf for v in model.graph.outputs if id(v) in home})
    sizes = {
        id(v): _bytes(v) for v in (*model.graph.inputs, *(v for n in nodes for v in n.outputs))
    }
    if any(math.isnan(size) for size in sizes.values()):
        return None
    alive = {v: sizes[v] for v in inputs}
    peak = sum(alive.values())
    for i, node in enumerate(nodes):
        read = [home[id(v)] for v in node.inputs if id(v) in home]
        for v in (v for v in node.outputs if home[id(v)] == id(v)):
            dying = [h for h in read if last[h] == i and alive.get(h) == sizes[id(v)]]
            if node.op_type in _IN_PLACE and dying:
                del alive[dying[0]]
            alive[id(v)] = sizes[id(v)]
        peak = max(peak, sum(alive.values()))
        for h in (*read, *(home[id(v)] for v in node.outputs)):
            if last[h] <= i:
                alive.pop(h, None)
    return int(peak)


def _bytes(value: Any) -> float:
    """Of a tensor; NaN where a size is not fixed, 0 where there is none."""
    if not value.name:
        return 0
    if value.shape is None or value.dtype is None:
        return math.nan
    sides = list(value.shape)
    fixed = all(isinstance(n, int) for n in sides)
    return math.ceil(math.prod(sides) * value.dtype.itemsize) if fixed else math.nan


def constants_of(model: Any) -> set[int]:
    """Values that no input decides."""
    fixed = {id(v) for v in model.graph.initializers.values()}
    fixed -= {id(v) for v in model.graph.inputs}
    for node in model.graph:
        if all(v is None or id(v) in fixed for v in node.inputs):
            fixed |= {id(v) for v in node.outputs}
    return fixed
