"""Single numbers in a graph of ONNX, of the shape that runtimes are fast with."""

from __future__ import annotations

import math
from typing import Any

from lightning_da3.exporting.onnx_passes.nodes import Nodes

SMALL = 256  # elements; with fewer, nothing is gained
_BINARY = set("Add Sub Mul Div Pow".split())


def shape_scalars_(model: Any) -> None:
    """Let a single number have as many axes as a tensor that it meets, if that ends in sides of 1.

    ::

        Mul(rate (), g (64, 672, 1, 1))   becomes   Mul(rate (1, 1, 1, 1), g)

    ONNX Runtime goes through the last axis otherwise, element by element: 40 times slower.

    Args:
        model: An ir model with shapes, edited in place.
    """
    shaped: dict[tuple[int, int], Any] = {}
    for node in list(model.graph):
        if node.op_type not in _BINARY:
            continue
        for i in (0, 1):
            number, tensor = node.inputs[i], node.inputs[1 - i]
            if number.shape is None or tensor.shape is None or not _meets(number, tensor):
                continue
            rank = len(tensor.shape)
            if (id(number), rank) not in shaped:
                nodes = Nodes(model, f"{number.name}.of_{rank}")
                value = nodes.call("Reshape", number, nodes.constant([1] * rank))
                value.shape, value.dtype = nodes.ir.Shape([1] * rank), number.dtype
                made = number.producer()
                if made is None:
                    model.graph.insert_before(model.graph[0], nodes.made)
                else:
                    model.graph.insert_after(made, nodes.made)
                shaped[id(number), rank] = value
            node.replace_input_with(i, shaped[id(number), rank])


def _meets(number: Any, tensor: Any) -> bool:
    """Whether one is a single number, and the other large and ends in a side of 1."""
    single, sides = list(number.shape), list(tensor.shape)
    if any(n != 1 for n in single) or len(single) >= len(sides) or sides[-1] != 1:
        return False
    return math.prod(n for n in sides if isinstance(n, int)) > SMALL
