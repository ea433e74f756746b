"""Multiply-accumulates of parts of a network."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import fx, nn

from lightning_da3.layers import CONVS, facts_of_call, operation
from lightning_da3.tracing.graphs import module_of

Shape = tuple[int, ...]


def macs_per_position(
    gm: fx.GraphModule,
    inside: Iterable[fx.Node],
    shapes: Mapping[fx.Node, Shape],
    positions: float | None,
) -> float:
    """Multiply-accumulates of linear maps and products of activations, for an output position.

    Where shapes are known, what works on fewer positions (squeeze and excitation) or on pairs of
    them (attention) counts as often as it runs. Else all maps count as if they had one size.

    Args:
        gm: A traced network.
        inside: The part's nodes.
        shapes: Shapes of one sample's values, by node.
        positions: Output positions of a sample, as far as these are known.
    """
    if positions is not None:
        return macs_of_all(gm, inside, shapes) / positions or 1.0
    return macs_of_all(gm, inside, None) or 1.0


def macs_of_all(
    gm: fx.GraphModule, nodes: Iterable[fx.Node], shapes: Mapping[fx.Node, Shape] | None
) -> float:
    """Multiply-accumulates of these nodes for one sample.

    Args:
        gm: A traced network.
        nodes: Of its graph.
        shapes: Shapes of one sample's values, by node; None: all maps count as if they had one
            size, which is one position.
    """
    if shapes is None:
        return sum(float(_weight_of(gm, node) or 0) for node in nodes)
    return sum(_macs_of(gm, node, shapes) for node in nodes)


def _weight_of(gm: fx.GraphModule, node: fx.Node) -> int | None:
    """The elements of the weight of a layer that maps channels to channels."""
    layer = module_of(gm, node)
    if isinstance(layer, (nn.Linear, *CONVS)):
        return layer.weight.numel()
    return 4 * layer.embed_dim**2 if isinstance(layer, nn.MultiheadAttention) else None


def _macs_of(gm: fx.GraphModule, node: fx.Node, shapes: Mapping[fx.Node, Shape]) -> float:
    """Those of one node, for one sample."""
    layer = module_of(gm, node)
    if isinstance(layer, (nn.Linear, *CONVS)) and node in shapes:
        return math.prod(shapes[node]) / len(layer.weight) * layer.weight.numel()
    operands = [shapes[a] for a in node.args if isinstance(a, fx.Node) and a in shapes]
    if isinstance(layer, nn.MultiheadAttention):
        return _of_attention(layer, operands)
    product = facts_of_call(node).does == "product" and not facts_of_call(node).elementwise
    if operation(node) == "scaled_dot_product_attention" and len(operands) >= 3:
        q, k, v = operands[:3]
        return float(math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1]))
    if operation(node) == "einsum":
        return _of_einsum(node.args, operands)
    if (product or operation(node) == "linear") and node in shapes and len(operands) > 1:
        first = operands[1] if operation(node) == "addmm" else operands[0]
        return float(math.prod(shapes[node]) * first[-1])
    return 0.0


def _of_attention(layer: nn.MultiheadAttention, operands: list[Shape]) -> float:
    axis = -2 if layer.batch_first or len(operands[0]) == 2 else 0
    queries, keys = operands[0][axis], operands[min(1, len(operands) - 1)][axis]
    projections = 2 * (queries + keys) * layer.embed_dim**2
    return float(projections + 2 * queries * keys * layer.embed_dim)


def _of_einsum(args: tuple[Any, ...], operands: list[Shape]) -> float:
    """The product of the sizes of all letters."""
    letters = str(args[0]).replace(" ", "").split("->")[0].split(",")
    if len(letters) != len(operands) or any(
        len(word) != len(shape) for word, shape in zip(letters, operands, strict=True)
    ):
        return 0.0  # with an ellipsis, or a list
    sizes = {
        letter: size
        for word, shape in zip(letters, operands, strict=True)
        for letter, size in zip(word, shape, strict=True)
    }
    return float(math.prod(sizes.values()))
