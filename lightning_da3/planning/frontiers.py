"""From which values others follow: a cut through a graph, moved back while less is kept at it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import fx

from lightning_da3.planning.flow import Flow, Nodes

_MOST_STEPS = 200
_BETTER, _MUCH_BETTER = 1.01, 1.1  # so much more must be saved, past a heavy operation too


class FrontierFinder:
    """Finds cuts of one graph.

    Args:
        flow: The flow of data in it.
        cost: What keeping a node's value costs.
        may_run_again: Whether a node's value may be computed again.
        is_heavy: Whether that takes much.
    """

    def __init__(
        self,
        flow: Flow,
        cost: Callable[[fx.Node], float],
        may_run_again: Callable[[fx.Node], bool],
        is_heavy: Callable[[fx.Node], bool],
    ) -> None:
        self.flow, self.cost = flow, cost
        self.may_run_again, self.is_heavy = may_run_again, is_heavy

    def find(self, end: fx.Node, alone: float, worth: float) -> list[list[fx.Node]]:
        """The values, in order, that `end` may be computed from; ways that save the most first.

        Args:
            end: Keeps its operands.
            alone: What that costs.
            worth: Where heavy operations run again, all must cost at least so much less.
        """
        values: Nodes = dict.fromkeys(self.flow.inputs(end))
        ways: list[Nodes] = []
        most, heavy, passed = 0.0, False, False
        for _ in range(_MOST_STEPS):
            total = sum(map(self.cost, values))
            better = _MUCH_BETTER if passed else _BETTER
            if alone >= total * (worth if heavy else 1.0) and alone - total > most * better:
                ways.append(dict(values))
                most, passed = alone - total, False
            node = self._latest(values)
            if node is None:
                break
            del values[node]
            values.update(dict.fromkeys(self.flow.inputs(node)))
            if self.is_heavy(node):
                heavy = passed = True
        return [sorted(way, key=self.flow.position.__getitem__) for way in reversed(ways)]

    def _latest(self, values: Iterable[fx.Node]) -> fx.Node | None:
        """The last of the values that costs anything and may be computed again."""
        able = [n for n in values if self.cost(n) > 0.0 and self.may_run_again(n)]
        return max(able, key=self.flow.position.__getitem__, default=None)


def leads_back(flow: Flow, inside: Nodes, sources: Iterable[fx.Node]) -> bool:
    """Whether any of the sources follows from what is inside: the two could not be in order."""
    last = max(map(flow.position.__getitem__, sources))
    reached = set(inside)
    for node in flow.nodes[flow.position[next(iter(inside))] : last + 1]:
        if any(i in reached for i in node.all_input_nodes):
            reached.add(node)
    return any(source in reached for source in sources)
