"""Nodes of a graph become a graph of their own, which one module calls in their place."""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from typing import Any

from torch import fx, nn

from lightning_da3.passes.freeze import STANDS_FOR, stands_for


def exits_of(inside: Collection[fx.Node]) -> list[fx.Node]:
    """The nodes whose values others read."""
    return [node for node in inside if any(user not in inside for user in node.users)]


def copied(
    inside: Collection[fx.Node], inputs: Sequence[fx.Node]
) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A graph of copies, from `inputs` to a tuple of what others read; and every node's copy.

    Args:
        inside: The nodes, in the order of the graph.
        inputs: All nodes that they read beside each other.
    """
    piece = fx.Graph()
    copies = {i: piece.placeholder(i.name) for i in inputs}
    for node in inside:
        copies[node] = piece.node_copy(node, copies.__getitem__)
    piece.output(tuple(copies[node] for node in exits_of(inside)))
    return piece, copies


def call_instead_(
    gm: fx.GraphModule,
    place: str,
    module: nn.Module,
    inside: Collection[fx.Node],
    inputs: Sequence[fx.Node],
    options: dict[str, Any] | None = None,
) -> None:
    """Put one call in the place of the first of the nodes, and take all of them out.

    Args:
        gm: Edited in place.
        place: The module's dotted name in it.
        module: Maps the values of `inputs` to a tuple, as the graph of `copied` does.
        inside: The nodes, in the order of the graph.
        inputs: What they read; those behind the first node are moved in front of it.
        options: Named arguments of the call.
    """
    graph, exits, first = gm.graph, exits_of(inside), next(iter(inside))
    gm.add_submodule(place, module)
    for node in inputs:
        _before(graph, node, first)
    with graph.inserting_before(first):
        name = place.replace(".", "_")
        call = graph.create_node("call_module", place, tuple(inputs), options or {}, name)
        results = [graph.call_function(operator.getitem, (call, k)) for k in range(len(exits))]
    for node, result in zip(exits, results, strict=True):
        result.meta[STANDS_FOR] = stands_for(node)
        node.replace_all_uses_with(result, delete_user_cb=lambda user: user not in inside)
    for node in reversed([*inside]):
        graph.erase_node(node)


def _before(graph: fx.Graph, node: fx.Node, place: fx.Node) -> None:
    """Let `node`, and what it is computed from, come before `place`."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    if order[node] < order[place]:
        return
    for i in node.all_input_nodes:
        _before(graph, i, place)
    place.prepend(node)
