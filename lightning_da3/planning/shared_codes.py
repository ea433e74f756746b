"""Which hosts read the value of an activation whose input may be kept for both of them.

A smooth activation keeps 8 bits an element of its derivative; where every position is a cell, the
adapter behind it keeps as much of the value. Both follow from the activation's input: six blocks of
two convolutions and SiLUs on maps of 5x5 pixels keep 25 % less so (batch 4: 69 -> 52 KiB).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from torch import fx

from lightning_da3.layers import replacement_for
from lightning_da3.nn.activation import QuantizedGradActivation
from lightning_da3.ops.activated import gives_value
from lightning_da3.planning.layers import layer_called
from lightning_da3.planning.nodes import value_of
from lightning_da3.planning.plan import HostPlan, NodePlan


def find_shared_codes(
    gm: fx.GraphModule, nodes: Sequence[NodePlan], hosts: Sequence[HostPlan]
) -> Iterator[HostPlan]:
    """The hosts, with the node of the activation whose codes their adapter may use.

    Args:
        gm: A traced graph.
        nodes: What becomes of every node.
        hosts: The graph's hosts.
    """
    named = {node.name: node for node in gm.graph.nodes}
    plan = {node.name: node for node in nodes}
    for host in hosts:  # what a graph reads, nothing wrote into: tracing sees to that
        node = value_of(named[host.source], plan)
        shares = host.stride is not None and _keeps_codes(gm, node, plan)
        yield dataclasses.replace(host, codes_from=node.name if shares else None)


def _keeps_codes(gm: fx.GraphModule, node: fx.Node, plan: Mapping[str, NodePlan]) -> bool:
    """Whether it is an activation that keeps codes, and may keep those of its input."""
    step = plan.get(node.name)
    if step is None or step.action != "replace" or step.keeps != "codes":
        return False
    layer = layer_called(gm, node)
    found = None if layer is None else replacement_for(layer)
    built = found.build(False) if found is not None and found.build is not None else None
    return isinstance(built, QuantizedGradActivation) and gives_value(built.smooth)
