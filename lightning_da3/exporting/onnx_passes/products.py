"""Products with matrices in a graph of ONNX, without copies of what they multiply."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_da3.exporting.onnx_passes.nodes import Nodes

# --- one matrix for a whole batch


def multiply_directly_(model: Any) -> None:
    """Let products with one matrix read it once, and maps as they lie.

    ::

        reshape(MatMul(reshape(expand(m)), reshape(x)))   becomes   MatMul(m, x)
        reshape(MatMul(reshape(x), m))                    becomes   MatMul(x, m)

    PyTorch records products of that kind as those of batches, for which it copies the matrix.

    Args:
        model: An ir model with shapes, edited in place; what is then unused is left.
    """
    for node in list(model.graph):
        if node.op_type == "MatMul":
            for i in (0, 1):
                _use_one_matrix_(model, node, i)
            for i in (0, 1):
                if _rank(node.inputs[i]) == 2 and _use_unfolded_(model, node, i):
                    break


def _use_one_matrix_(model: Any, node: Any, i: int) -> None:
    """Put the matrix in the place of its copies, operand `i`."""
    copies, other, result = node.inputs[i], node.inputs[1 - i], node.outputs[0]
    made = _made_by("Reshape", copies)
    expanded = copies if made is None else made.inputs[0]
    made = _made_by("Expand", expanded)
    if made is None or _rank(other) < 3 or not _same(other, result, slice(0, -2)):
        return
    matrix, sides = made.inputs[0], slice(-2, None)
    alike = _same(matrix, expanded, sides) and _same(matrix, copies, sides)
    if _rank(matrix) < 2 or not alike:
        return
    if any(n != 1 for n in list(matrix.shape)[:-2]):
        return
    if _rank(matrix) > 2:
        nodes = Nodes(model, f"{result.name}.matrix")
        shape = list(matrix.shape)[-2:]
        if not all(isinstance(n, int) for n in shape):
            return
        flat = nodes.call("Reshape", matrix, nodes.constant(shape))
        flat.shape, flat.dtype = nodes.ir.Shape(shape), matrix.dtype
        model.graph.insert_before(node, nodes.made)
        matrix = flat
    node.replace_input_with(i, matrix)


def _use_unfolded_(model: Any, node: Any, i: int) -> bool:
    """Multiply what was reshaped for it, if the result is reshaped back; operand `i` is 2-D."""
    kept = -2 if i == 0 else -1  # axes that the product reads come behind
    made, result = _made_by("Reshape", node.inputs[1 - i]), node.outputs[0]
    if made is None or result.is_graph_output():
        return False
    x = made.inputs[0]
    if _rank(x) < 3 or not _same(x, node.inputs[1 - i], slice(kept, None)):
        return False
    users = [use.node for use in result.uses()]
    if not users or any(u.op_type != "Reshape" for u in users):
        return False
    for user in users:
        back = user.outputs[0]
        alike = _rank(back) == _rank(x) and _same(back, x, slice(0, kept))
        if not alike or not _same(back, result, slice(kept, None)):
            return False
    ends = [user for user in users if user.outputs[0].is_graph_output()]
    if len(ends) > 1:  # each has a name of its own
        return False
    nodes = Nodes(model, f"{result.name}.direct")
    operands = (node.inputs[0], x) if i == 0 else (x, node.inputs[1])
    y = nodes.call("MatMul", *operands)
    y.shape, y.dtype = users[0].outputs[0].shape, result.dtype
    model.graph.insert_before(node, nodes.made)
    for user in users:
        user.outputs[0].replace_all_uses_with(y, replace_graph_outputs=True)
    for user in ends:
        y.name = user.outputs[0].name
        model.graph.remove(user, safe=True)
    return True


# --- means of maps that are padded with zeros


def pool_before_padding_(model: Any) -> None:
    """Products along both sides of a map read it without the zeros around it.

    ::

        MatMul(MatMul(a, Pad(x)), b)   becomes   MatMul(MatMul(a[:, t:-b], x), b[l:-r])

    Padding is then left to the convolution that it is for, which runtimes join it with.

    Args:
        model: An ir model with shapes, edited in place; what is then unused is left.
    """
    for node in list(model.graph):
        inner = _made_by("MatMul", node.inputs[0]) if node.op_type == "MatMul" else None
        padded = None if inner is None else _made_by("Pad", inner.inputs[1])
        if inner is None or padded is None:
            continue
        left, right, pads = _numbers(inner.inputs[0]), _numbers(node.inputs[1]), _zeros(padded)
        if left is None or right is None or pads is None or left.ndim != 2 or right.ndim != 2:
            continue
        top, begin, bottom, end = pads
        nodes = Nodes(model, f"{node.outputs[0].name}.unpadded")
        rows = nodes.constant(np.ascontiguousarray(left[:, top : left.shape[1] - bottom]))
        columns = nodes.constant(np.ascontiguousarray(right[begin : right.shape[0] - end]))
        x = padded.inputs[0]
        between = nodes.call("MatMul", rows, x)
        between.dtype = x.dtype
        if x.shape is not None:
            between.shape = nodes.ir.Shape([*list(x.shape)[:-2], len(left), list(x.shape)[-1]])
        nodes.replace(node, nodes.call("MatMul", between, columns))


def _zeros(node: Any) -> Sequence[int] | None:
    """The zeros above, left, below and right of the last two axes; None: it pads otherwise."""
    pads = _numbers(node.inputs[1])
    value = _numbers(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] else np.zeros(1)
    mode = node.attributes["mode"].value if "mode" in node.attributes else "constant"
    axes = len(node.inputs) > 3 and node.inputs[3] is not None
    if pads is None or value is None or value.any() or mode != "constant" or axes:
        return None
    if len(pads) < 4:  # of a vector
        return None
    begin, end = pads[: len(pads) // 2].tolist(), pads[len(pads) // 2 :].tolist()
    if any(begin[:-2] + end[:-2]) or min(begin + end) < 0:
        return None
    return [*begin[-2:], *end[-2:]]


# --- values


def _made_by(op: str, value: Any) -> Any:
    """The node of that operation that makes a value; None: another does."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op else None


def _numbers(value: Any) -> np.ndarray | None:
    """A constant's numbers; None: it is none."""
    if value is None or value.is_graph_input():
        return None
    held = value.const_value
    node = _made_by("Constant", value)
    if held is None and node is not None and "value" in node.attributes:
        held = node.attributes["value"].value
    return None if held is None else np.asarray(held.numpy())


def _rank(value: Any) -> int:
    """The number of axes; 0 where it is not known."""
    return 0 if value is None or value.shape is None else len(value.shape)


def _same(a: Any, b: Any, axes: slice) -> bool:
    """Whether two values have sides alike there."""
    first, second = (list(v.shape)[axes] if v.shape is not None else [None] for v in (a, b))
    return len(first) == len(second) and all(map(_equal, first, second))


def _equal(n: Any, m: Any) -> bool:
    if isinstance(n, int) or isinstance(m, int):
        return bool(n == m)
    return getattr(n, "value", None) is not None and n.value == getattr(m, "value", None)
