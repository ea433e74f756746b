"""Which nodes carry activations, and through which of them everything must pass."""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Iterable
from functools import cached_property

from torch import fx

from lightning_da3.layers import attribute_is_number, facts_of_call

Nodes = dict[fx.Node, None]  # an ordered set


class Flow:
    """How data flows through a traced graph.

    Attributes:
        nodes: All nodes, in order.
        position: The position of every node among them.
        activations: Nodes whose value is computed from the network's input: neither constants,
            such as parameters, nor numbers, such as sizes.
        numbers: Nodes whose value is computed from sizes alone.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.nodes = list(graph.nodes)
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self.activations: Nodes = {}
        self.numbers: set[fx.Node] = set()
        for node in self.nodes:
            inputs = node.all_input_nodes
            if node.op == "placeholder":
                # others, such as masks, matter where a layer reads them
                if not self.activations or any(u.op == "call_module" for u in node.users):
                    self.activations[node] = None
            elif _is_number(node) or (inputs and all(i in self.numbers for i in inputs)):
                self.numbers.add(node)
            elif any(i in self.activations for i in inputs):
                self.activations[node] = None

    def inputs(self, node: fx.Node) -> list[fx.Node]:
        """Activations that `node` reads."""
        return [i for i in node.all_input_nodes if i in self.activations]

    def readers(self, node: fx.Node) -> list[fx.Node]:
        """Activations that read `node`."""
        return [user for user in node.users if user in self.activations]

    def tensors_in(self, values: Iterable[fx.Node], tensors: Container[fx.Node]) -> list[fx.Node]:
        """The values, or what is taken out of those that are lists, in order.

        Args:
            values: Nodes.
            tensors: Nodes whose value is one tensor; empty if nothing is known.
        """
        waiting, found = list(values), []
        for node in waiting:
            readers = self.readers(node)
            listed = tensors and node not in tensors and readers
            if listed and all(user.target is operator.getitem for user in readers):
                waiting += readers
            else:
                found.append(node)
        return sorted(found, key=self.position.__getitem__)

    @cached_property
    def before(self) -> dict[fx.Node, fx.Node | None]:
        """By node, the last node before it through which its whole value flows."""
        return dominators(self.activations, self.inputs)

    @cached_property
    def behind(self) -> dict[fx.Node, fx.Node | None]:
        """By node, the first node behind it through which its whole effect flows."""
        return dominators(list(reversed(self.activations)), self.readers)

    def between(self, first: fx.Node, last: Iterable[fx.Node]) -> Nodes:
        """All nodes, numbers too, on a way from `first` (excluded) to any of `last` (included)."""
        return self.behind_any([first], last)

    def behind_any(self, first: Iterable[fx.Node], last: Iterable[fx.Node]) -> Nodes:
        """All nodes, numbers too, on a way from any of `first` to any of `last`."""
        first, last = set(first), list(last)
        start = min(self.position[node] for node in first) + 1
        end = max(self.position[node] for node in last) + 1
        downstream = set(first)
        for node in self.nodes[start:end]:
            if any(i in downstream for i in node.all_input_nodes):
                downstream.add(node)
        upstream = set(last)
        for node in reversed(self.nodes[start:end]):
            if node in upstream and node not in first:
                upstream.update(node.all_input_nodes)
        inside = (downstream & upstream) - first
        for node in self.nodes[start:end]:
            # nobody reads it: it is there for what it writes into values of the region
            read = self.inputs(node)
            if not node.users and read and node.op != "output" and set(read) <= inside:
                inside.add(node)
        return dict.fromkeys(sorted(inside, key=self.position.__getitem__))


def _is_number(node: fx.Node) -> bool:
    attribute = node.op == "call_function" and node.target is getattr
    return facts_of_call(node).gives_number or (attribute and attribute_is_number(node.args[1]))


def dominators(
    nodes: Iterable[fx.Node], inputs: Callable[[fx.Node], list[fx.Node]]
) -> dict[fx.Node, fx.Node | None]:
    """Immediate dominators of a directed acyclic graph, in one pass.

    Args:
        nodes: The nodes in topological order.
        inputs: Direct predecessors of a node, all of them in `nodes`.

    Returns:
        None for nodes that nothing dominates.
    """
    found: dict[fx.Node, fx.Node | None] = {}
    depth: dict[fx.Node | None, int] = {None: 0}
    for node in nodes:
        meet: fx.Node | None = None
        for i, other in enumerate(inputs(node)):
            if i == 0:
                meet = other
                continue
            b: fx.Node | None = other
            while meet is not b:
                if depth[meet] >= depth[b]:
                    meet = None if meet is None else found[meet]
                else:
                    b = None if b is None else found[b]
        found[node] = meet
        depth[node] = depth[meet] + 1
    return found
