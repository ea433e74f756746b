"""What becomes of every node, and what its backward keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import fx, nn

from lightning_da3.layers import (
    CONVS,
    Replacement,
    convolution_of,
    facts_of,
    facts_of_call,
    has_hooks,
    is_in_place,
    operation,
    replacement_for,
)
from lightning_da3.planning.layers import has_statistics, layer_called
from lightning_da3.planning.plan import HostPlan, NodePlan
from lightning_da3.tracing.graphs import module_of


def plan_nodes(
    gm: fx.GraphModule,
    places: Mapping[str, str],
    head: str | None,
    folds: dict[str, str],
    trained: set[str],
    exact: bool = False,
) -> Iterator[NodePlan]:
    """What becomes of every call in the graph, in order.

    Args:
        gm: A traced network.
        places: The place of every call in the converted network.
        head: Module name of the classifier.
        folds: Convolution by batch norm node.
        trained: Names of nodes that something trainable is upstream of.
        exact: Take only what gives the exact gradient.
    """
    fresh: set[str] = set()  # nodes whose result is new memory that nothing else refers to
    for node in gm.graph.nodes:
        if not node.op.startswith("call"):
            continue
        planned = _plan_node(gm, node, places[node.name], head, folds, fresh, trained, exact)
        if _is_fresh(node, planned, fresh):
            fresh.add(node.name)
        if node.name not in trained:
            planned = dataclasses.replace(planned, keeps="nothing")
        yield planned


def value_of(node: fx.Node, plan: Mapping[str, NodePlan]) -> fx.Node:
    """The node that gives the value of `node` in the converted network."""
    while node.name in plan and plan[node.name].gone and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _is_free(node: fx.Node, fresh: set[str]) -> bool:
    """Whether `node` alone reads its first argument, and that is new memory."""
    before = node.args[0] if node.args else None
    return isinstance(before, fx.Node) and before.name in fresh and len(before.users) == 1


def _is_fresh(node: fx.Node, planned: NodePlan, fresh: set[str]) -> bool:
    facts = facts_of_call(node)
    if is_in_place(node) and planned.action == "leave" and not facts.elementwise:
        return False  # its backward may read what it wrote, as that of torch.tanh_ does
    if planned.inplace or planned.gone or is_in_place(node):
        return _is_free(node, fresh)  # the memory of what it reads, under a second name
    if planned.action in ("freeze", "affine", "replace"):
        return True
    return facts.elementwise or facts.does == "concatenation"


def _plan_node(
    gm: fx.GraphModule,
    node: fx.Node,
    place: str,
    head: str | None,
    folds: dict[str, str],
    fresh: set[str],
    trained: set[str],
    exact: bool,
) -> NodePlan:
    called = module_of(gm, node)
    layer = layer_called(gm, node)
    label = _label(node, called)
    free = _is_free(node, fresh)
    step = partial(NodePlan, node.name, place, label)
    if node.op == "call_module" and str(node.target) == head:
        return step("leave", "head")
    if isinstance(called, CONVS) and type(called) in CONVS and not has_hooks(called):
        return step("freeze")
    if _is_conv_of_constants(node):
        return step("freeze")
    if node.name in folds:
        return step("fold", fold_into=folds[node.name])
    if has_statistics(called):
        return step("affine", inplace=free)
    if free and _is_sum(node):
        return step("accumulate", inplace=True)
    replacement = replacement_for(layer, exact) if layer is not None else None
    if replacement is None:
        return step("leave", _keeps(node, called, trained))
    if replacement.build is None:  # what is called with a list, as nn.Identity may be, gives that
        return step("remove" if isinstance(node.args[0], fx.Node) else "leave", "nothing")
    inplace = _overwrites(replacement, free)
    return step("replace", replacement.keeps, inplace)


def _is_sum(node: fx.Node) -> bool:
    two = len(node.args) == 2 and not node.kwargs and isinstance(node.args[1], fx.Node)
    written = node.op == "call_method" and is_in_place(node)  # ``x.add_(y)`` keeps the type of x
    return two and facts_of_call(node).does == "sum" and not written


def _is_conv_of_constants(node: fx.Node) -> bool:
    found = convolution_of(node.target, node.args, node.kwargs)
    return found is not None and all(_is_constant(i) for i in found[1][1:])


def _is_constant(node: Any) -> bool:
    """Whether it is computed from the network's own tensors alone."""
    waiting, seen = [node], set()
    while waiting:
        node = waiting.pop()
        if not isinstance(node, fx.Node) or node.op == "get_attr" or node in seen:
            continue
        seen.add(node)
        if node.op in ("placeholder", "call_module") or not node.all_input_nodes:
            return False
        waiting += node.all_input_nodes
    return True


def _overwrites(replacement: Replacement, free: bool) -> bool:
    """Whether to write in place: where the user did, or where nobody could tell."""
    return replacement.inplace is not None and (replacement.inplace or free)


def _label(node: fx.Node, called: nn.Module | None) -> str:
    if called is not None:
        return type(called).__name__
    return operation(node)


def _keeps(node: fx.Node, called: nn.Module | None, trained: set[str]) -> str:
    """What PyTorch keeps of a call that is left as it is."""
    if called is not None:
        return facts_of(called).keeps
    facts = facts_of_call(node)
    carrying = [i for i in node.all_input_nodes if i.name in trained]
    if facts.does == "product":  # of each operand what the others need
        alone = len(carrying) <= 1 and sum(a in carrying for a in node.args) <= 1
    elif facts.does == "quotient":
        alone = len(carrying) == 1 and node.args[0] in carrying and node.args[1] not in carrying
    else:
        return facts.keeps
    return "nothing" if alone else "kept"


def trained_through(
    gm: fx.GraphModule, hosts: tuple[HostPlan, ...], inputs: Sequence[fx.Node]
) -> set[str]:
    """Names of nodes behind something trainable. The others build no autograd graph.

    Args:
        gm: A traced network.
        hosts: The hosts of that graph.
        inputs: Placeholders whose value may be trained already.
    """
    last = {host.last for host in hosts}
    trained = {node.name for node in inputs}
    for node in gm.graph.nodes:
        if any(i.name in trained or i.name in last for i in node.all_input_nodes):
            trained.add(node.name)
    return trained
