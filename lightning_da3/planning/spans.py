"""Exact mode: which parts of a network keep one activation and are computed again as a whole.

Between two values through which everything flows lies a link of a chain. Neighbouring links that
are computed again as one keep the first value from the forward to the backward pass, and what
their operations keep for the short while of their own backward.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Container, Iterable, Sequence
from dataclasses import dataclass, replace

from torch import fx

from lightning_da3.planning.aliases import Writers
from lightning_da3.planning.flow import Flow
from lightning_da3.planning.plan import HostPlan, NodePlan, RecomputeRegion
from lightning_da3.tracing.graphs import output_node

_LEVELS = 24
_BYTES = {"bits": 0.125, "codes": 1.0, "kept": 4.0, "head": 4.0}  # an element that is read
_EQUAL = 1.03  # peaks are estimates: those so close to the lowest count as equal
_ALIKE = 1.25  # and kept bytes so close to the fewest, where it spares computing again


@dataclass
class _Link:
    """From one value of the chain to the next, or several such links that are computed again.

    Attributes:
        source: The first value.
        end: The last value.
        source_bytes: The size of the first value.
        end_bytes: The size of the last value, and of its gradient.
        inner_bytes: What the operations between the two keep for the backward one by one.
        alone_bytes: What they keep where regions of some of them are computed again.
        region_bytes: The most that the operations of one such region keep during its backward.
        moment_bytes: The largest total of one operation's operands and result.
        recomputed: The link is computed again; before that is decided, it may be.
        parts: The links that this one joins.
    """

    source: fx.Node
    end: fx.Node
    source_bytes: float
    end_bytes: float
    inner_bytes: float
    alone_bytes: float
    region_bytes: float
    moment_bytes: float
    recomputed: bool
    parts: tuple[_Link, ...] = ()

    @property
    def kept_bytes(self) -> float:
        """What stays from the forward to the backward pass."""
        return self.source_bytes if self.recomputed else self.alone_bytes

    @property
    def peak_bytes(self) -> float:
        """The highest total while this link's backward runs, without what earlier links keep."""
        if not self.recomputed:
            return self.alone_bytes + self.region_bytes + self.moment_bytes
        inner, highest = 0.0, self.inner_bytes + self.moment_bytes
        for part in self.parts:  # the second forward pass
            inner += part.inner_bytes
            highest = max(highest, inner + part.moment_bytes)
        # its first and last value, and the gradient of that
        return self.source_bytes + 2 * self.end_bytes + highest


class SpanFinder:
    """Finds the spans of one graph that lower the peak of a training step.

    Args:
        flow: The flow of data through the traced graph.
        size: The number of elements of every node's value.
        tensors: Nodes whose value is one tensor.
        nodes: What becomes of every node.
        regions: What is computed again where there is no span.
        hosts: The graph's hosts.
        pure: Whether a node may run a second time.
        writers: By node, what writes into the memory of its value.
        max_cells: The most cells of an adapter's grid.
    """

    def __init__(
        self,
        flow: Flow,
        size: dict[fx.Node, float],
        tensors: Container[fx.Node],
        nodes: tuple[NodePlan, ...],
        regions: Sequence[RecomputeRegion],
        hosts: tuple[HostPlan, ...],
        pure: dict[fx.Node, bool],
        writers: Writers,
        max_cells: int,
    ) -> None:
        self.flow, self.size, self.pure, self.max_cells = flow, size, pure, max_cells
        self.writers = writers
        self.plan = {node.name: node for node in nodes}
        self.regions, self.hosts, self.tensors = regions, hosts, tensors
        self.named = {node.name: node for node in flow.nodes}
        # there, what flows through the adapter flows past
        self.in_hosts = {
            node
            for host in hosts
            for node in flow.between(self.named[host.source], [self.named[host.last]])
        }

    def find(self) -> list[RecomputeRegion]:
        """The spans, in order: the lowest peak first, then the fewest bytes kept, then FLOPs."""
        links = self._links()
        inner = [link.inner_bytes for link in links]
        if not any(inner):
            return []
        ratio = sum(inner) / max(inner)
        levels = [max(inner) * ratio ** (i / (_LEVELS - 1)) for i in range(_LEVELS)]
        ways = [[replace(link, recomputed=False) for link in links]]
        ways += [_join(links, level * 1.001) for level in levels]
        most = _EQUAL * min(map(_peak, ways))
        low = [way for way in ways if _peak(way) <= most]
        most = _ALIKE * min(map(_kept, low))
        best = min((way for way in low if _kept(way) <= most), key=_recomputed)
        return [self._region(link) for link in best if link.recomputed]

    def _region(self, span: _Link) -> RecomputeRegion:
        inside = self.flow.between(span.source, [span.end])
        return RecomputeRegion(span.source.name, tuple(n.name for n in inside), with_hosts=True)

    def _links(self) -> list[_Link]:
        found = []
        for source, end in itertools.pairwise(self._chain()):
            inside = self.flow.between(source, [end])
            regions = [r for r in self.regions if r.nodes[-1] in {n.name for n in inside}]
            again = {name for region in regions for name in region.nodes}
            moments = [
                self.size[n] + sum(self.size[i] for i in self.flow.inputs(n)) for n in inside
            ]
            link = _Link(
                source,
                end,
                source_bytes=4.0 * self.size[source],
                end_bytes=4.0 * self.size[end],
                inner_bytes=self._inner(inside),
                alone_bytes=self._inner([n for n in inside if n.name not in again])
                + sum(4.0 * self.size[self.named[region.source]] for region in regions),
                region_bytes=max((self._of_nodes(region.nodes) for region in regions), default=0.0),
                moment_bytes=4.0 * max(moments),
                recomputed=all(self.pure.get(n, False) for n in inside),
            )
            found.append(replace(link, parts=(link,)))
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
        return not self.writers.get(node)

    def _of_nodes(self, names: Iterable[str]) -> float:
        """What nodes keep one by one, in bytes."""
        total = 0.0
        for name in names:
            if name in self.plan:
                operands = sum(self.size[i] for i in self.flow.inputs(self.named[name]))
                total += _BYTES.get(self.plan[name].keeps, 0.0) * operands
        return total

    def _inner(self, inside: Collection[fx.Node]) -> float:
        """What nodes and the adapters of hosts that end there keep one by one, in bytes."""
        total = self._of_nodes(node.name for node in inside)
        for host in self.hosts:
            if self.named[host.last] in inside:
                x, y = self.size[self.named[host.source]], self.size[self.named[host.last]]
                x, y = (min(n, self.max_cells * c) for n, c in
                        ((x, host.in_channels), (y, host.out_channels)))  # fmt: skip
                total += 4.0 * (x + y)
        return total


def _join(links: list[_Link], level: float) -> list[_Link]:
    """The way to join neighbours that keeps the least from the forward to the backward pass.

    Args:
        links: The whole chain.
        level: The most bytes that a joined link may keep inside.

    Returns:
        Joined links, which are computed again, and single ones, which keep what they keep.
    """
    best: list[tuple[float, list[_Link]]] = [(0.0, [])]
    for end, last in enumerate(links):
        kept, done = best[end]
        choices = [(kept + last.alone_bytes, [*done, replace(last, recomputed=False)])]
        inner = 0.0
        for start in range(end, -1, -1):
            first = links[start]
            inner += first.inner_bytes
            if not first.recomputed or inner > level:
                break
            kept, done = best[start]
            parts = tuple(links[start : end + 1])
            span = replace(
                first,
                end=last.end,
                end_bytes=last.end_bytes,
                inner_bytes=inner,
                moment_bytes=max(part.moment_bytes for part in parts),
                parts=parts,
            )
            choices.append((kept + first.source_bytes, [*done, span]))
        best.append(min(choices, key=lambda choice: choice[0]))
    return best[-1][1]


def _kept(way: list[_Link]) -> float:
    """What stays from the forward to the backward pass, in bytes."""
    return sum(link.kept_bytes for link in way)


def _recomputed(way: list[_Link]) -> int:
    """How many links are computed again."""
    return sum(len(link.parts) for link in way if link.recomputed)


def _peak(way: list[_Link]) -> float:
    """An estimate of the highest total of a step, in bytes."""
    kept = peak = 0.0
    for link in way:
        peak = max(peak, kept + link.peak_bytes)
        kept += link.kept_bytes
    return peak
