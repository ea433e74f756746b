"""Which residual branches can be skipped as a whole: ``x + f(x)`` becomes ``x``.

A branch can be skipped where what it computes is added to what it reads, both of one shape, and is
read by nothing else. Scaled forms, ``x + drop_path(gamma * f(x))``, are the same.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from torch import fx, nn

from lightning_da3.layers import (
    BATCH_NORMS,
    CONVS,
    facts_of,
    facts_of_call,
    is_in_place,
    may_draw,
    may_share,
)
from lightning_da3.planning.flow import Flow, Nodes
from lightning_da3.planning.layers import common_path, overwrites
from lightning_da3.planning.macs import macs_of_all
from lightning_da3.planning.plan import BranchPlan, HostPlan
from lightning_da3.planning.shapes import Shapes
from lightning_da3.tracing.graphs import Part, module_of
from lightning_da3.tracing.guards import GUARDS


@dataclasses.dataclass(frozen=True)
class Branch:
    """One branch of one graph.

    Attributes:
        total: The node that adds it to what it reads.
        shortcut: The position of what it reads among that node's arguments.
        nodes: The nodes that nothing else needs, in order.
        modules: What the user's network calls the modules that it calls, in order.
        name: What they have in common.
    """

    total: fx.Node
    shortcut: int
    nodes: Nodes
    modules: tuple[str, ...]
    name: str

    @property
    def writes(self) -> bool:
        """Whether the sum is written into the memory of what the branch reads: ``x += f(x)``."""
        return self.shortcut == 0 and is_in_place(self.total)


class BranchFinder:
    """Finds the branches of one graph.

    Args:
        part: The traced graph.
        flow: The flow of data in it.
        shapes: Shapes of its values; None: branches are only to be found again.
    """

    def __init__(self, part: Part, flow: Flow, shapes: Shapes | None) -> None:
        self.part, self.gm, self.flow, self.shapes = part, part.gm, flow, shapes

    def find(self) -> Iterator[Branch]:
        """Every branch, in the order in which data meets them."""
        for node in self.flow.activations:
            operands = list(node.args)
            if facts_of_call(node).does != "sum" or len(operands) != 2 or node.kwargs:
                continue
            for shortcut in (0, 1):
                x, last = operands[shortcut], operands[1 - shortcut]
                if isinstance(x, fx.Node) and isinstance(last, fx.Node):
                    branch = self._branch(node, shortcut, x, last)
                    if branch is not None:
                        yield branch

    def _branch(self, node: fx.Node, shortcut: int, x: fx.Node, last: fx.Node) -> Branch | None:
        known = self.flow.activations
        if x is last or x not in known or last not in known or len(last.users) != 1:
            return None
        if not (self._are_alike(x, last, node) and self._dominates(x, last)):
            return None
        inside = self._alone(self.flow.between(x, [last]), last)
        if inside is None or any(self._acts_elsewhere(n, inside) for n in inside):
            return None
        called = [str(n.target) for n in inside if n.op == "call_module"]
        named = [t for t in called if self._holds_weights(t)] or called
        if not named:
            return None
        modules = tuple(self.part.user_name(target) for target in called)
        name = self.part.user_name(common_path(named))
        return Branch(node, shortcut, inside, modules, name)

    def _are_alike(self, *nodes: fx.Node) -> bool:
        """Whether values have one shape, so that nothing is broadcast."""
        if self.shapes is None:
            return True
        shapes = [self.shapes.get(node) for node in nodes]
        return shapes[0] is not None and all(shape == shapes[0] for shape in shapes)

    def _dominates(self, x: fx.Node, node: fx.Node) -> bool:
        step: fx.Node | None = node
        while step is not None and self.flow.position[step] > self.flow.position[x]:
            step = self.flow.before[step]
        return step is x

    def _alone(self, inside: Nodes, last: fx.Node) -> Nodes | None:
        """The nodes, with sizes and checks of what they compute; None: others read them, too."""
        found, waiting = dict(inside), [n for n in inside if n is not last]
        for node in waiting:
            for user in node.users:
                if user in found:
                    continue
                if not (user in self.flow.numbers or user.target in GUARDS):
                    return None
                found[user] = None
                waiting.append(user)
        for node in found:
            of_others = [i for i in node.all_input_nodes if i not in found]
            if node.target in GUARDS and of_others:
                return None
        return dict.fromkeys(sorted(found, key=self.flow.position.__getitem__))

    def _acts_elsewhere(self, node: fx.Node, inside: Nodes) -> bool:
        """Whether a node writes into a value of others, or draws numbers that others would get."""
        writes = bool(node.args) and overwrites(self.gm, node, None)
        if writes and any(n not in inside for n in _chain(self.gm, node.args[0])):
            return True
        layer = module_of(self.gm, node)
        if layer is not None:
            return facts_of(layer).random
        return node.op.startswith("call") and may_draw(node.target, node.args, node.kwargs)

    def _holds_weights(self, target: str) -> bool:
        return any(True for _ in self.gm.get_submodule(target).parameters())


def plan_branches(
    parts: Sequence[tuple[Part, Flow, Shapes]], hosts: Sequence[Sequence[HostPlan]]
) -> tuple[list[tuple[BranchPlan, ...]], list[float]]:
    """The branches of every graph, and every graph's multiply-accumulates.

    Args:
        parts: The graphs, with what is known of them.
        hosts: The hosts of every graph.
    """
    macs = [
        macs_of_all(part.gm, list(part.gm.graph.nodes), shapes or None) for part, _, shapes in parts
    ]
    names: Counter[str] = Counter()
    found: list[list[tuple[Branch, BranchPlan]]] = []
    for (part, flow, shapes), own in zip(parts, hosts, strict=True):
        found.append([])
        for branch in BranchFinder(part, flow, shapes).find():
            inner = [i for i, (p, _, _) in enumerate(parts) if is_under(p.path, branch.modules)]
            count = macs_of_all(part.gm, branch.nodes, shapes) + sum(macs[i] for i in inner)
            if not count:
                continue
            names[branch.name] += 1
            number = names[branch.name]
            inside = {node.name for node in branch.nodes}
            closed = [h.name for h in own if h.last in inside or h.readers[0] in inside]
            closed += [host.name for i in inner for host in hosts[i]]
            plan = BranchPlan(
                name=branch.name + (f":{number}" if number > 1 else ""),
                total=branch.total.name,
                modules=branch.modules,
                macs=count,
                hosts=tuple(closed),
            )
            found[-1].append((branch, plan))
    every = [(part, *pair) for (part, _, _), of in zip(parts, found, strict=True) for pair in of]

    def around(part: Part, branch: Branch) -> tuple[str, ...]:
        return tuple(
            plan.name
            for other, outer, plan in every
            if (other is part and branch.total in outer.nodes) or is_under(part.path, outer.modules)
        )

    planned = [
        tuple(dataclasses.replace(plan, within=around(part, branch)) for branch, plan in of)
        for (part, _, _), of in zip(parts, found, strict=True)
    ]
    return planned, macs


def is_under(path: str, modules: Iterable[str]) -> bool:
    """Whether a graph is of one of these modules, or of a part of one."""
    return bool(path) and any(f"{path}.".startswith(f"{module}.") for module in modules)


# --- memory ---------------------------------------------------------------------------------------


def needs_copy(gm: fx.GraphModule, branch: Branch) -> bool:
    """Whether what the branch reads must be copied to stand for the sum, which is new memory.

    It must where something writes into the sum, or later into what the branch reads, and anybody
    could tell.

    Args:
        gm: The graph, with the branch in it.
        branch: To be skipped.
    """
    if branch.writes:
        return False
    x, order = branch.total.args[branch.shortcut], {n: i for i, n in enumerate(gm.graph.nodes)}
    chain = list(_chain(gm, x))
    sums = _shared(gm, [branch.total])
    mine = _shared(gm, chain) - sums
    now = order[branch.total]
    if any(order[node] > now for node in _writers(gm, mine)):
        return True
    if not _writers(gm, sums):
        return False
    gone = {branch.total, *branch.nodes}
    others = [user for node in mine for user in node.users if user not in {*mine, *gone}]
    return bool(others) or not all(_keeps_no_values(gm, node) for node in chain)


def _chain(gm: fx.GraphModule, node: object) -> Iterator[fx.Node]:
    """A node, and those before it whose values may lie in the same memory."""
    while isinstance(node, fx.Node):
        yield node
        if not _hands_on(gm, node):
            return
        node = node.args[0] if node.args else None


def _shared(gm: fx.GraphModule, nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes, and those behind them whose values may lie in the same memory."""
    waiting = list(nodes)
    for node in waiting:
        for user in node.users:
            if user not in waiting and user.args and user.args[0] is node and _hands_on(gm, user):
                waiting.append(user)
    return set(waiting)


def _writers(gm: fx.GraphModule, nodes: Iterable[fx.Node]) -> list[fx.Node]:
    return [
        user
        for node in nodes
        for user in node.users
        if user.args and user.args[0] is node and overwrites(gm, user, None)
    ]


def _hands_on(gm: fx.GraphModule, node: fx.Node) -> bool:
    return overwrites(gm, node, None) or may_share(node, module_of(gm, node))


def _keeps_no_values(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a value may be overwritten as far as the backward of what gave it is concerned."""
    layer = module_of(gm, node)
    if layer is not None:
        known = isinstance(layer, (*CONVS, *BATCH_NORMS, nn.Linear))
        return known or facts_of(layer).keeps in ("nothing", "bits")
    return facts_of_call(node).does == "sum"
