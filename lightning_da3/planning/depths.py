"""How deep in the network the candidates for hosts lie: how many of them data met before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import fx

from lightning_da3.planning.flow import Flow
from lightning_da3.planning.plan import HostPlan
from lightning_da3.tracing.graphs import Part

Place = tuple[str, str]  # path of a graph, name of a host in it


class Graph(NamedTuple):
    """A graph and its candidates."""

    part: Part
    flow: Flow
    hosts: Sequence[HostPlan]


def depths(graphs: Sequence[Graph]) -> dict[Place, float]:
    """By candidate, which share of all others on the longest way through it lies before it.

    Graphs that Python calls are taken to follow each other in the order of their modules.

    Args:
        graphs: All graphs of a network, in the order in which modules are registered.

    Returns:
        From 0 (the first) to 1 (the last); of the only one on its way 1.
    """
    found: dict[Place, float] = {}
    inside = _inside(graphs)
    for place, before, behind in _row(inside[None], inside, 0, 0):
        share = before / (before + behind) if before + behind else 1.0
        found[place] = max(share, found.get(place, 0.0))  # what runs several times counts as last
    return found


_Inside = Mapping[str | None, list[Graph]]


def _inside(graphs: Sequence[Graph]) -> _Inside:
    """By path of a graph, those right inside of its module; by None, those in no other."""
    paths = [graph.part.path for graph in graphs]
    found: dict[str | None, list[Graph]] = {path: [] for path in (None, *paths)}
    for graph in graphs:
        holders = [p for p in paths if p != graph.part.path and _holds(p, graph.part.path)]
        found[max(holders, key=len) if holders else None].append(graph)
    return found


def _holds(path: str, other: str) -> bool:
    return not path or other == path or other.startswith(f"{path}.")


def _row(
    row: Sequence[Graph], inside: _Inside, before: int, behind: int
) -> Iterator[tuple[Place, int, int]]:
    """Candidates of graphs that follow each other, and how many lie before and behind each."""
    lengths = [_Lengths(graph, inside) for graph in row]
    for i, graph in enumerate(lengths):
        others = (sum(g.whole for g in part) for part in (lengths[:i], lengths[i + 1 :]))
        first, last = (count + more for count, more in zip((before, behind), others, strict=True))
        yield from graph.places(first, last)


class _Lengths:
    """The longest chains of candidates in a graph, up to every node and from it on."""

    def __init__(self, graph: Graph, inside: _Inside) -> None:
        self.graph, self.inside = graph, inside
        part, nodes = graph.part, graph.flow.nodes
        self.called: dict[fx.Node, list[Graph]] = {}
        for node in nodes:
            if node.op == "call_module":
                path = part.user_name(str(node.target))
                called = [g for g in inside[part.path] if _holds(path, g.part.path)]
                if called:
                    self.called[node] = called
        ends = [host.last for host in graph.hosts]
        self.own = {node: ends.count(node.name) for node in nodes}
        for node, row in self.called.items():
            self.own[node] += sum(_Lengths(g, inside).whole for g in row)
        self.until: dict[fx.Node, int] = {}
        for node in nodes:
            before = max((self.until[i] for i in node.all_input_nodes), default=0)
            self.until[node] = before + self.own[node]
        self.since: dict[fx.Node, int] = {}
        for node in reversed(nodes):
            self.since[node] = max((self.since[u] + self.own[u] for u in node.users), default=0)
        self.whole: int = max(self.until.values(), default=0)

    def places(self, before: int, behind: int) -> Iterator[tuple[Place, int, int]]:
        nodes = {node.name: node for node in self.graph.flow.nodes}
        for host in self.graph.hosts:
            node = nodes[host.last]
            yield (self.graph.part.path, host.name), *self._around(node, before, behind)
        for node, row in self.called.items():
            yield from _row(row, self.inside, *self._around(node, before, behind))

    def _around(self, node: fx.Node, before: int, behind: int) -> tuple[int, int]:
        return before + self.until[node] - self.own[node], behind + self.since[node]
