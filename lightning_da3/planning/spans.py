"""Exact mode: which regions_of of a network keep one activation and are computed again as a whole.

Between two values through which everything flows lies a region. Computed again, it keeps the
first of the two for the time between forward and backward, and what its operations keep for the
short while of its own backward.
"""

from __future__ import annotations

import itertools
from collections.abc import Container
from dataclasses import dataclass, replace

from torch import fx

from lightning_da3.layers import is_in_place
from lightning_da3.planning.flow import Flow
from lightning_da3.planning.plan import HostPlan, NodePlan, RecomputeRegion
from lightning_da3.tracing.graphs import output_node

# what a byte that lives during one region's backward counts, beside one that lives all the time
TRANSIENT = 0.1
_LEVELS = 24


@dataclass
class _Stretch:
    """From one value of the chain to the next: bytes of the first, and of what lies between."""

    source: fx.Node
    end: fx.Node
    source_bytes: float
    inner_bytes: float
    again: bool  # it may be computed again


class SpanFinder:
    """Finds the spans of one graph.

    Args:
        flow: Of the traced graph.
        size: Elements of every node's value.
        tensors: Nodes whose value is one tensor.
        nodes: What becomes of every node.
        hosts: Of the graph.
        pure: Whether a node may run a second time.
        max_cells: Most cells of an adapter's grid.
    """

    def __init__(
        self,
        flow: Flow,
        size: dict[fx.Node, float],
        tensors: Container[fx.Node],
        nodes: tuple[NodePlan, ...],
        hosts: tuple[HostPlan, ...],
        pure: dict[fx.Node, bool],
        max_cells: int,
    ) -> None:
        self.flow, self.size, self.pure, self.max_cells = flow, size, pure, max_cells
        self.plan = {node.name: node for node in nodes}
        self.hosts, self.tensors = hosts, tensors
        self.named = {node.name: node for node in flow.nodes}
        # there, what flows through the adapter flows past
        self.in_hosts = {
            node
            for host in hosts
            for node in flow.between(self.named[host.source], [self.named[host.last]])
        }

    def find(self) -> list[RecomputeRegion]:
        """The spans that keep the least, in order."""
        regions_of = self._stretches()
        if not regions_of:
            return []
        inner = [s.inner_bytes for s in regions_of]
        least, most = max(inner), sum(inner)
        if not least:
            return []
        levels = [least * (most / least) ** (i / (_LEVELS - 1)) for i in range(_LEVELS)]
        best = min((_join(regions_of, level * 1.001) for level in levels), key=_cost)
        return [self._region(s) for s in best if s.again]

    def _region(self, span: _Stretch) -> RecomputeRegion:
        inside = self.flow.between(span.source, [span.end])
        return RecomputeRegion(span.source.name, tuple(n.name for n in inside), with_hosts=True)

    def _stretches(self) -> list[_Stretch]:
        chain = self._chain()
        found = []
        for source, end in itertools.pairwise(chain):
            inside = self.flow.between(source, [end])
            again = all(self.pure.get(n, False) for n in inside)
            found.append(
                _Stretch(source, end, 4.0 * self.size[source], self._inner(set(inside)), again)
            )
        return found

    def _chain(self) -> list[fx.Node]:
        """Values through which everything flows, from before the first host to the output."""
        if not self.hosts:
            return []
        first = min(self.flow.position[self.named[h.source]] for h in self.hosts)
        node: fx.Node | None = output_node(self.flow.nodes[0].graph)
        chain = []
        node = None if node is None else self.flow.before.get(node)
        while node is not None:
            if self._stays(node):
                chain.append(node)
            if self.flow.position[node] <= first and chain and chain[-1] is node:
                break
            node = self.flow.before[node]
        return chain[::-1]

    def _stays(self, node: fx.Node) -> bool:
        """Whether the node's value is still there when its backward comes."""
        if node not in self.tensors or node in self.in_hosts:
            return False
        planned = self.plan.get(node.name)
        if planned is not None and planned.action in ("freeze", "fold", "remove"):
            return False
        for user in node.users:
            step = self.plan.get(user.name)
            over = is_in_place(user) or (step is not None and step.inplace)
            if user.args and user.args[0] is node and over:
                return False
        return True

    def _inner(self, inside: set[fx.Node]) -> float:
        total = 0.0
        for node in inside:
            planned = self.plan.get(node.name)
            if planned is None:
                continue
            operands = sum(self.size[i] for i in self.flow.inputs(node))
            unit = {"bits": 0.125 * operands, "kept": 4.0 * operands}
            unit |= {"codes": operands, "recomputed": operands}
            unit["head"] = 4.0 * operands  # for the gradient of its weight
            total += unit.get(planned.keeps, 0.0)
        for host in self.hosts:
            if self.named[host.last] in inside:
                x, y = self.size[self.named[host.source]], self.size[self.named[host.last]]
                x, y = (min(n, self.max_cells * c) for n, c in
                        ((x, host.in_channels), (y, host.out_channels)))  # fmt: skip
                total += 4.0 * (x + y)
        return total


def _join(regions_of: list[_Stretch], level: float) -> list[_Stretch]:
    """The way to join neighbours that keeps the least all the time.

    Args:
        regions_of: Of a whole chain.
        level: Most bytes between the ends of what is computed again.

    Returns:
        Joined ones, which are computed again, and single ones, which keep what they keep.
    """
    best: list[tuple[float, list[_Stretch]]] = [(0.0, [])]
    for end, last in enumerate(regions_of):
        kept, done = best[end]
        choices = [(kept + last.inner_bytes, [*done, replace(last, again=False)])]
        inner = 0.0
        for start in range(end, -1, -1):
            first = regions_of[start]
            inner += first.inner_bytes
            if not first.again or inner > level:
                break
            kept, done = best[start]
            span = _Stretch(first.source, last.end, first.source_bytes, inner, True)
            choices.append((kept + first.source_bytes, [*done, span]))
        best.append(min(choices, key=lambda choice: choice[0]))
    return best[-1][1]


def _cost(joined: list[_Stretch]) -> float:
    stays = sum(s.source_bytes if s.again else s.inner_bytes for s in joined)
    return stays + TRANSIENT * max((s.inner_bytes for s in joined if s.again), default=0.0)
