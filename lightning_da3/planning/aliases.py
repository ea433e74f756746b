"""Which nodes of a graph write into which values' memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import fx

from lightning_da3.layers import facts_of, facts_of_call, is_in_place
from lightning_da3.planning.layers import overwrites
from lightning_da3.planning.plan import NodePlan
from lightning_da3.tracing.graphs import module_of

Writers = dict[fx.Node, set[fx.Node]]


def find_writers(gm: fx.GraphModule, plan: Mapping[str, NodePlan]) -> Writers:
    """By node, what writes into the memory of its value.

    Args:
        gm: A traced network.
        plan: What becomes of every node, by name.
    """
    found: Writers = {}
    for node in gm.graph.nodes:
        if node.args and _writes(gm, node, plan.get(node.name)):
            for other in _memory_of(gm, node.args[0], plan):
                found.setdefault(other, set()).add(node)
    return found


def _writes(gm: fx.GraphModule, node: fx.Node, step: NodePlan | None) -> bool:
    """Whether the node will write into its first argument."""
    if step is None or step.action == "leave":
        return overwrites(gm, node, step)
    return step.inplace


def _memory_of(gm: fx.GraphModule, node: object, plan: Mapping[str, NodePlan]) -> Iterator[fx.Node]:
    """A node, and those before it whose values may lie in the same memory."""
    while isinstance(node, fx.Node):
        yield node
        if not _hands_on(gm, node, plan.get(node.name)):
            return
        node = node.args[0] if node.args else None


def _hands_on(gm: fx.GraphModule, node: fx.Node, step: NodePlan | None) -> bool:
    """Whether the value may be, or be a view of, the first argument."""
    if is_in_place(node) or facts_of_call(node).view or node.target is getattr:
        return True
    if step is not None and (step.inplace or step.gone):
        return True
    layer = module_of(gm, node)
    facts = facts_of(layer)  # such as a Flatten's; what a matrix gives is new
    return layer is not None and facts.keeps == "nothing" and not facts.mixes_channels
