"""Which hosts' gates need no cell means to be kept.

The gradient of a gate needs the mean of the host's output over every cell. Where cells are single
pixels and the host is one cheap convolution, it follows from the host's input, whose codes the
adapter keeps anyway: regnet_x_400mf keeps 28 % less so (batch 4, 224 px: 3.37 -> 2.42 MiB).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from torch import fx

from lightning_da3.layers import CONVS
from lightning_da3.planning.nodes import value_of
from lightning_da3.planning.plan import HostPlan, NodePlan
from lightning_da3.tracing.graphs import module_of

# Multiply-accumulates for one byte that is not kept. Pointwise and grouped convolutions stay below,
# a dense 3x3 of 128 channels and more does not: the backward would take half as long again.
MOST_MACS = 1024


def find_means(
    gm: fx.GraphModule, nodes: Sequence[NodePlan], hosts: Sequence[HostPlan]
) -> Iterator[HostPlan]:
    """The hosts, with the node from whose convolution the means are computed again.

    Args:
        gm: A traced graph.
        nodes: What becomes of every node.
        hosts: The graph's hosts.
    """
    named = {node.name: node for node in gm.graph.nodes}
    plan = {node.name: node for node in nodes}
    for host in hosts:
        node = value_of(named[host.last], plan)
        conv = module_of(gm, node) if node.args[:1] == (named[host.source],) else None
        cheap = isinstance(conv, CONVS) and conv.weight[0].numel() <= MOST_MACS
        frozen = node.name in plan and plan[node.name].action == "freeze"
        yield dataclasses.replace(host, means_from=node.name) if cheap and frozen else host
