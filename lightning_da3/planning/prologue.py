"""The prologue: what comes before the first host and treats every sample by itself."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from lightning_da3.layers import facts_of, facts_of_call, has_hooks
from lightning_da3.planning.flow import Flow
from lightning_da3.planning.layers import layer_called, overwrites
from lightning_da3.planning.plan import HostPlan, NodePlan, ProloguePlan
from lightning_da3.planning.shapes import Shapes

# rules by which nodes were planned whose operations never mix samples
_ALONE = ("freeze", "fold", "affine", "remove")


def find_prologue(
    gm: fx.GraphModule,
    flow: Flow,
    shapes: Shapes,
    nodes: tuple[NodePlan, ...],
    hosts: tuple[HostPlan, ...],
) -> ProloguePlan | None:
    """The nodes that may run in microbatches, or None if no map is worth it.

    Args:
        gm: A traced network.
        flow: The flow of data in it.
        shapes: The shapes of one sample's values.
        nodes: What becomes of every node.
        hosts: The network's hosts.
    """
    x = next((n for n in flow.activations if n.op == "placeholder" and n in shapes), None)
    if x is None or len(shapes[x]) < 2:
        return None
    planned = {node.name: node for node in nodes}
    begun = {name for host in hosts for name in (*host.readers, host.last)}
    inside, ended = {x: None}, False
    for node in flow.activations:
        reads = flow.inputs(node)
        if not any(i in inside for i in reads):
            continue
        known = node in shapes and node.name in planned and all(i in inside for i in reads)
        alone = known and _is_by_sample(gm, flow, shapes, node, planned[node.name])
        ended = ended or not alone or node.name in begun
        if ended and not _only_reads(gm, planned, node):
            break  # nothing may be read before, or written behind, what it was in the network
        if alone and node.name not in begun:
            inside[node] = None
    while _share_memory(gm, planned, inside):
        inside.popitem()
    del inside[x]
    largest = max((math.prod(shapes[node]) for node in inside), default=0)
    if largest <= math.prod(shapes[x]):
        return None
    names = tuple(node.name for node in inside)
    return ProloguePlan(x.name, names, len(shapes[x]), largest / math.prod(shapes[x]))


def _share_memory(
    gm: fx.GraphModule, planned: dict[str, NodePlan], inside: dict[fx.Node, None]
) -> bool:
    """Whether others read two values that lie in one memory; microbatches' results do not."""
    memory: dict[fx.Node, fx.Node] = {}
    for node in inside:
        first = node.args[0] if node.args else None
        again = isinstance(first, fx.Node) and first in inside and _hands_on(gm, planned, node)
        memory[node] = memory[first] if again else node  # type: ignore[index]
    read = [memory[node] for node in inside if any(user not in inside for user in node.users)]
    return len(read) > len({*read})


def _only_reads(gm: fx.GraphModule, planned: dict[str, NodePlan], node: fx.Node) -> bool:
    """Whether a node writes into no memory but its own, and hands on none."""
    if node.name not in planned or planned[node.name].action in ("freeze", "fold"):
        return node.name in planned
    known = facts_of(layer_called(gm, node)).by_sample or facts_of_call(node).elementwise
    return known and not _hands_on(gm, planned, node)


def _hands_on(gm: fx.GraphModule, planned: dict[str, NodePlan], node: fx.Node) -> bool:
    """Whether the result lies in the memory of the first argument."""
    step = planned[node.name]
    turned = facts_of_call(node).does == "permutation"
    gone = step.action == "remove" or isinstance(layer_called(gm, node), nn.Identity)
    return turned or gone or overwrites(gm, node, step)


def _is_by_sample(
    gm: fx.GraphModule, flow: Flow, shapes: Shapes, node: fx.Node, planned: NodePlan
) -> bool:
    """Whether a node gives (N, ..), every sample from that sample alone."""
    layer = layer_called(gm, node)
    if layer is not None and has_hooks(layer):
        return False
    if planned.action in _ALONE:
        return True
    if planned.action == "leave" and planned.keeps == "head":
        return False
    axes = len(shapes[node])
    if facts_of(layer).by_sample:
        return not isinstance(layer, nn.LayerNorm) or len(layer.normalized_shape) < axes
    if node.op == "call_module":
        return False
    given: list[Any] = [*node.args[1:], *node.kwargs.values()]
    facts = facts_of_call(node)
    if facts.elementwise:
        return all(_broadcasts(flow, shapes, i, axes) for i in node.all_input_nodes)
    if facts.does == "concatenation":
        return len(given) == 1 and isinstance(given[0], int) and given[0] % axes > 0
    if node.target is F.layer_norm:
        return bool(given) and isinstance(given[0], (tuple, list)) and len(given[0]) < axes
    if facts.does == "permutation":
        order = given[0] if len(given) == 1 and isinstance(given[0], (tuple, list)) else given
        return bool(order) and order[0] == 0
    return False


def _broadcasts(flow: Flow, shapes: Shapes, operand: fx.Node, axes: int) -> bool:
    """Whether an operand has an axis of samples, or is the same for all of them."""
    if operand in flow.activations:
        return len(shapes[operand]) == axes
    shape = shapes.get(operand)
    return operand.op == "get_attr" and shape is not None and (len(shape) < axes or shape[0] == 1)
