"""Where hosts are: every spatial convolution.

A depthwise one takes its pointwise neighbours along: it mixes no channels itself, and the narrow
ends of such a block are what is cheap to read.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from torch import fx, nn

from lightning_da3.nn.frozen import numbers
from lightning_da3.planning.layers import (
    has_statistics,
    is_depthwise,
    is_pointwise,
    is_spatial,
    layer_called,
)
from lightning_da3.planning.plan import HostPlan
from lightning_da3.registry import replacement_for
from lightning_da3.tracing import module_of


def find_hosts(
    gm: fx.GraphModule, min_stride: int, head: str | None, folds: dict[str, str]
) -> Iterator[HostPlan]:
    """Every host of the network, in the order in which data meets them.

    Args:
        gm: A traced network.
        min_stride: Hosts only where the input is downsampled by at least this.
        head: Module name of the classifier, which is no host.
        folds: Convolution by batch norm node.
    """
    reduction = _reductions(gm)
    names: Counter[str] = Counter()
    norm_of = {conv: norm for norm, conv in folds.items()}
    for node in gm.graph.nodes:
        conv = module_of(gm, node)
        if not is_spatial(conv) or str(node.target) == head:
            continue
        if reduction[node] < min_stride:
            continue
        first = last = node
        if is_depthwise(conv):
            first = _neighbour(gm, node, head, backwards=True) or node
            last = _neighbour(gm, node, head, backwards=False) or node
        names[str(node.target)] += 1
        count = names[str(node.target)]
        yield _host(
            gm,
            name=str(node.target) + (f":{count}" if count > 1 else ""),  # a layer called again
            chain=_chain(first, last),
            last=norm_of.get(last.name, last.name),
        )


def _host(gm: fx.GraphModule, name: str, chain: list[fx.Node], last: str) -> HostPlan:
    convs = [layer for node in chain if type(layer := module_of(gm, node)) is nn.Conv2d]
    macs, area = 0.0, 1
    for conv in reversed(convs):  # earlier ones work on larger maps
        macs += conv.weight.numel() * area
        area *= math.prod(conv.stride)
    stride = tuple(math.prod(axis) for axis in zip(*(c.stride for c in convs), strict=True))
    return HostPlan(
        name, chain[0].name, last, convs[0].in_channels, convs[-1].out_channels, stride, macs
    )


def _neighbour(
    gm: fx.GraphModule, node: fx.Node, head: str | None, *, backwards: bool
) -> fx.Node | None:
    """The pointwise convolution next to `node`, past batch norms and activations only."""
    while True:
        if backwards:
            step = node.args[0] if node.args else None
        else:
            step = next(iter(node.users)) if len(node.users) == 1 else None
        if not isinstance(step, fx.Node) or (backwards and len(step.users) != 1):
            return None
        layer = layer_called(gm, step)
        if is_pointwise(layer):
            return None if str(step.target) == head else step
        replacement = replacement_for(layer) if layer is not None else None
        elementwise = has_statistics(layer) or (
            replacement is not None and (replacement.keeps == "bits" or replacement.build is None)
        )
        if not elementwise:
            return None
        node = step


def _chain(first: fx.Node, last: fx.Node) -> list[fx.Node]:
    chain = [last]
    while chain[-1] is not first:
        before = chain[-1].args[0]
        assert isinstance(before, fx.Node)
        chain.append(before)
    return chain[::-1]


def _reductions(gm: fx.GraphModule) -> dict[fx.Node, int]:
    """By how much every node's output is smaller than the network's input, along an axis."""
    reduction: dict[fx.Node, int] = {}
    for node in gm.graph.nodes:
        before = max((reduction[i] for i in node.all_input_nodes), default=1)
        layer = layer_called(gm, node)
        stride = getattr(layer, "stride", 1) if layer is not None else 1
        reduction[node] = before * max(numbers(stride, 1)) if stride else before
    return reduction
