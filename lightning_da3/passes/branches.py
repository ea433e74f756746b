"""``x + f(x)`` becomes ``x``, and what nothing needs any more goes."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import fx, nn

from lightning_da3.errors import DA3Error
from lightning_da3.nn.gate import Recorder
from lightning_da3.planning.branches import Branch, BranchFinder, needs_copy
from lightning_da3.planning.flow import Flow
from lightning_da3.planning.plan import HostPlan, Plan
from lightning_da3.planning.planner import known_hosts
from lightning_da3.tracing.graphs import Part, Traced, module_in, output_node


def without_branches(
    traced: Traced, plan: Plan, skipped: Collection[str]
) -> tuple[Traced, dict[str, list[HostPlan]]]:
    """A traced network without these branches, and its hosts by the path of their graph.

    Args:
        traced: Edited in place.
        plan: The plan of the whole network, which names branches and hosts.
        skipped: Names of branches; of those that nothing of the traced computes, nothing is done.

    Raises:
        DA3Error: One is computed, and cannot be skipped.
    """
    waiting = set(skipped)
    hosts = {path: list(own) for path, own in known_hosts(traced, plan).items()}
    for part, branches in found_again(traced, plan):
        stands = {}
        graph = part.gm.graph
        waiting -= {*branches}
        for branch in (branch for name, branch in branches.items() if name in skipped):
            if branch.total in graph.nodes:  # or it is in a branch that is gone
                copies = needs_copy(part.gm, branch)
                x = skip_(graph, branch.total, branch.shortcut, copies=copies)
                stands[branch.total.name] = x.name
                remove_dead_(part.gm, graph, [node.name for node in branch.nodes])
        graph.lint()
        part.gm.recompile()
        part.gm.delete_all_unused_submodules()
        hosts[part.path] = list(_left(graph, hosts[part.path], stands))
    left = {id(module) for module in traced.root.modules()}
    smaller = dataclasses.replace(
        traced,
        parts=tuple(part for part in traced.parts if id(part.gm) in left),
        python={path: why for path, why in traced.python.items() if _has(traced.root, path)},
    )
    check_not_computed(smaller, plan, waiting)
    return smaller, hosts


def check_not_computed(traced: Traced, plan: Plan, names: Collection[str]) -> None:
    """Refuse branches that cannot be skipped, where they are computed: they must not run unheard.

    Args:
        traced: A traced network.
        plan: The plan of the whole network, which names branches.
        names: Of branches that were not found again in it.

    Raises:
        DA3Error: One is computed.
    """
    called = {
        part.user_name(str(node.target))
        for part in traced.parts
        for node in part.gm.graph.nodes
        if node.op == "call_module"
    }
    there = [b.name for b in plan.branches if b.name in names and called.intersection(b.modules)]
    if not there:
        return
    reasons = [why for path, why in traced.python.items() if path] or [*traced.functions.values()]
    why = f" ({reasons[0]})" if reasons else ""
    raise DA3Error(
        f"{there} of {traced.network} cannot be skipped in calls like this one: what adds them "
        f"stays Python here{why}. Convert the network as it is used, such as inside "
        "`torch.autocast`: `model.plan.branches` has what can be skipped then."
    )


def _left(
    graph: fx.Graph, hosts: Sequence[HostPlan], stands: Mapping[str, str]
) -> Iterator[HostPlan]:
    """The hosts that are still there, which read what stands for sums that are gone."""
    names = {node.name for node in graph.nodes}
    for host in hosts:
        source = host.source
        while source in stands:
            source = stands[source]
        if names >= {source, host.last, *host.readers}:
            yield dataclasses.replace(host, source=source)


def found_again(traced: Traced, plan: Plan) -> Iterator[tuple[Part, dict[str, Branch]]]:
    """Every graph of a traced network, with those of a plan's branches that it has, by name."""
    known: dict[tuple[tuple[str, ...], int], str] = {}
    counts: Counter[tuple[str, ...]] = Counter()
    for planned in plan.branches:
        known[planned.modules, counts[planned.modules]] = planned.name
        counts[planned.modules] += 1
    seen: Counter[tuple[str, ...]] = Counter()
    for part in traced.parts:
        found = {}
        for branch in BranchFinder(part, Flow(part.gm.graph), None).find():
            name = known.get((branch.modules, seen[branch.modules]))
            seen[branch.modules] += 1
            if name is not None:
                found[name] = branch
        yield part, found


def skip_(graph: fx.Graph, total: fx.Node, shortcut: int, *, copies: bool) -> fx.Node:
    """Let the value that a branch reads stand for the sum; the branch itself stays for now.

    Args:
        graph: Edited in place.
        total: The node that adds the branch.
        shortcut: The position of what it reads among that node's arguments.
        copies: It is copied.

    Returns:
        What stands for the sum.
    """
    x = cast(fx.Node, total.args[shortcut])
    if copies:
        with graph.inserting_before(total):
            x = graph.call_function(torch.clone, (x,))
            x.meta = dict(total.meta)
    total.replace_all_uses_with(x)
    graph.erase_node(total)
    return x


def remove_dead_(root: nn.Module, graph: fx.Graph, names: Sequence[str]) -> None:
    """Take out what nothing needs any more.

    Args:
        root: Holds what the graph calls.
        graph: Edited in place.
        names: Nodes that are there for their result alone. Others that nobody reads stay.
    """
    notes = [n for n in graph.nodes if isinstance(module_in(root, n), Recorder)]
    kept = {*names, *(note.name for note in notes)}
    acting = [n for n in graph.nodes if not n.users and n.name not in kept]
    live = _needed([output_node(graph), *acting])
    for note in notes:  # what it notes, its host gave
        host = cast(fx.Node, cast(fx.Node, note.args[0]).args[0])
        if host in live:
            live |= _needed([note])
    for node in reversed(graph.nodes):
        if node not in live and node.op != "placeholder":
            graph.erase_node(node)


def _needed(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    waiting = list(nodes)
    live = set(waiting)
    for node in waiting:
        new = [i for i in node.all_input_nodes if i not in live]
        live.update(new)
        waiting += new
    return live


def _has(root: nn.Module, path: str) -> bool:
    try:
        return root.get_submodule(path) is not None
    except AttributeError:
        return False
