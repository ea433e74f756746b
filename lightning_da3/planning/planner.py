"""What will be done to traced graphs, decided before anything is built."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from lightning_da3.config import AdapterConfig, DA3Config
from lightning_da3.errors import ConversionError
from lightning_da3.layers import CONVS
from lightning_da3.planning.branches import plan_branches
from lightning_da3.planning.depths import Graph, depths
from lightning_da3.planning.flow import Flow
from lightning_da3.planning.folding import find_folds
from lightning_da3.planning.forms import FormFinder
from lightning_da3.planning.head import find_head
from lightning_da3.planning.hosts import POOLED, HostFinder
from lightning_da3.planning.known_hosts import hosts_found_again
from lightning_da3.planning.means import find_means
from lightning_da3.planning.nodes import plan_nodes, trained_through
from lightning_da3.planning.places import common_owner, find_places, free_name
from lightning_da3.planning.plan import HostPlan, NodePlan, PartPlan, Plan, RecomputeRegion
from lightning_da3.planning.prologue import find_prologue
from lightning_da3.planning.regions import RegionFinder
from lightning_da3.planning.shapes import (
    InputSize,
    Shapes,
    find_shapes,
    input_size,
    reductions,
    sizes,
)
from lightning_da3.planning.shared_codes import find_shared_codes
from lightning_da3.planning.spans import SpanFinder
from lightning_da3.planning.stored import find_stored
from lightning_da3.tracing.graphs import Part, Traced, module_of

Hosts = Mapping[str, Sequence[HostPlan]]
NEAR = 0.9  # of tokens, a class token among them counts as a position


@dataclass
class _Draft:
    """What is known of one graph before its nodes are planned."""

    part: Part
    flow: Flow
    shapes: Shapes
    head: str | None
    folds: dict[str, str]
    finder: HostFinder
    candidates: list[tuple[float, HostPlan]]


def make_plan(
    traced: Traced,
    config: DA3Config,
    examples: Sequence[Any] | None = None,
    hosts_of: Plan | Hosts | None = None,
) -> Plan:
    """Decide what becomes of every node.

    Args:
        traced: From `lightning_da3.tracing.islands.trace`; only read.
        config: The user's choices.
        examples: The network's arguments, whose shapes decide what is computed again; guessed if
            left out.
        hosts_of: The plan of the whole network, if `traced` is a part or another method of it: of
            its hosts those that are in this graph whole, which may be none. Or these, by the path
            of their graph.

    Raises:
        ConversionError: There is nothing to adapt, or the head cannot be found.
    """
    head = find_head(traced, config.head, examples)
    every, size = hosts_of is not None, input_size(traced)
    drafts = [
        _draft(part, head, part.inputs if part.path else examples, size, every)
        for part in traced.parts
    ]
    _count_from_the_input_(drafts)
    if hosts_of is not None:
        hosts = _known_in(drafts, hosts_of) if isinstance(hosts_of, Plan) else hosts_of
        for draft in drafts:
            draft.candidates = [(1.0, host) for host in hosts[draft.part.path]]
    elif not any(draft.candidates for draft in drafts):
        for draft in drafts:
            draft.candidates = [(1.0, host) for host in draft.finder.any_layers()]
    found = [reduction for draft in drafts for reduction, _ in draft.candidates]
    if not found and hosts_of is None:
        raise ConversionError(_nothing_message(traced))
    if not every:
        _choose_(drafts, config.adapter)
    training = [draft.part.path for draft in drafts if draft.head or draft.candidates]
    parts = tuple(_plan_part(draft, config, training) for draft in drafts)
    if not every:
        parts = tuple(_with_branches(drafts, parts))
    python = tuple(traced.python.items())
    functions = tuple(traced.functions.items())
    return Plan(traced.network, parts, head, _input_channels(traced), python, functions)


def known_hosts(traced: Traced, plan: Plan) -> Hosts:
    """The hosts of a plan that a traced network has whole, by the path of their graph."""
    size = input_size(traced)
    drafts = [_draft(p, plan.head, p.inputs if p.path else None, size, True) for p in traced.parts]
    return _known_in(drafts, plan)


def _known_in(drafts: Sequence[_Draft], plan: Plan) -> Hosts:
    return {
        draft.part.path: hosts_found_again(
            draft.part, draft.finder, [host for _, host in draft.candidates], plan
        )
        for draft in drafts
    }


def _count_from_the_input_(drafts: Sequence[_Draft]) -> None:
    """Reductions of graphs that others call, counted from the network's input."""
    before: dict[str, float] = {}  # by path of what a graph calls
    for draft in drafts:
        path = draft.part.path
        holders = [p for p in before if path == p or path.startswith(f"{p}.")]
        own = before[max(holders, key=len)] if holders else 1.0
        draft.candidates = [
            (reduction if draft.finder.counted(host) else own * reduction, host)
            for reduction, host in draft.candidates
        ]
        for node, reduction in reductions(draft.part.gm).items():
            if node.op == "call_module":
                before[draft.part.user_name(str(node.target))] = own * reduction


def _choose_(drafts: Sequence[_Draft], choice: AdapterConfig) -> None:
    """Leave the candidates that lie where hosts are asked for, or as near to that as any do."""
    graphs = [Graph(d.part, d.flow, [host for _, host in d.candidates]) for d in drafts]
    depth = depths(graphs)
    found = [reduction for draft in drafts for reduction, _ in draft.candidates]
    least = NEAR * _least_reduction(choice.min_stride, found)
    for draft in drafts:
        draft.candidates = [(r, host) for r, host in draft.candidates if r >= least]
    left = [(draft.part.path, host) for draft in drafts for _, host in draft.candidates]
    most = max(depth[path, host.name] for path, host in left)
    least = min(_least_depth(choice.min_depth, [host for _, host in left]), most)
    for draft in drafts:
        path = draft.part.path
        draft.candidates = [(r, h) for r, h in draft.candidates if depth[path, h.name] >= least]


def _least_reduction(min_stride: int | str, found: Sequence[float]) -> float:
    """Which downsampling a host's input needs, in a network whose candidates have these.

    What was pooled to one position is not downsampled: hosts of the maps before it stay hosts.
    """
    most = max([reduction for reduction in found if reduction != POOLED], default=1.0)
    if isinstance(min_stride, str):
        min_stride = math.ceil(min(16.0, max(8.0, most / 2)))
    return min(min_stride, most)


def _least_depth(min_depth: float | str, candidates: Sequence[HostPlan]) -> float:
    """How deep a host must lie, where these are left to choose from.

    Blocks of tokens are computed again, so what is behind the first host costs twice as much.
    """
    if not isinstance(min_depth, str):
        return min_depth
    # one linear layer alone is none
    blocks = sum(host.stride is None and host.readers != (host.last,) for host in candidates)
    return 1 / 3 if 2 * blocks > len(candidates) else 0.0


def _draft(
    part: Part, head: str | None, examples: Sequence[Any] | None, size: InputSize, every: bool
) -> _Draft:
    own = next((t for t in _targets(part.gm) if part.user_name(t) == head), None)
    flow = Flow(part.gm.graph)
    shapes = find_shapes(part.gm, examples)
    folds = dict(find_folds(part.gm, own))
    finder = HostFinder(part, flow, shapes, own, folds, size, examples)
    return _Draft(part, flow, shapes, own, folds, finder, list(finder.candidates(every=every)))


def _targets(gm: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in gm.graph.nodes if node.op == "call_module"]


def _calls_one_of(part: Part, node: fx.Node, paths: Sequence[str]) -> bool:
    """Whether a node calls one of these modules, or one that holds one of them."""
    if node.op != "call_module":
        return False
    called = part.user_name(str(node.target))
    return any(path == called or path.startswith(f"{called}.") for path in paths)


def _plan_part(draft: _Draft, config: DA3Config, training: Sequence[str]) -> PartPlan:
    gm, exact = draft.part.gm, config.memory.exact
    hosts = tuple(host for _, host in draft.candidates)
    # what an island reads may come from one that is trained
    inputs = [n for n in draft.flow.activations if n.op == "placeholder" and draft.part.path]
    others = [path for path in training if path != draft.part.path]  # graphs that this one calls
    inputs += [n for n in draft.flow.activations if _calls_one_of(draft.part, n, others)]
    trained = trained_through(gm, hosts, inputs)
    places = find_places(gm)
    nodes = tuple(plan_nodes(gm, places, draft.head, draft.folds, trained, exact))
    size = sizes(gm, draft.shapes)
    finder = RegionFinder(
        gm, draft.flow, size, draft.shapes, nodes, hosts, inputs, draft.head, exact
    )
    regions = tuple(finder.find())
    if exact and draft.shapes:
        cells = config.adapter.max_cells
        spans = SpanFinder(
            draft.flow,
            size,
            draft.shapes,
            nodes,
            regions,
            hosts,
            finder.pure(),
            finder.writers,
            cells,
        ).find()
        inside = {name for span in spans for name in span.nodes}
        regions = (*spans, *[s for s in regions if not inside & set(s.nodes)])
    again = {name for region in regions for name in region.nodes}
    # from codes, what was decided must not be decided again
    stays = ("nothing",) if exact else ("nothing", "bits")
    nodes = tuple(
        dataclasses.replace(node, keeps="recomputed")
        if node.name in again and node.keeps not in stays
        else node
        for node in nodes
    )
    stored = set() if config.memory.stored_dtype is None else {*find_stored(gm, nodes)}
    nodes = tuple(
        dataclasses.replace(node, stored=config.memory.weights if node.name in stored else "")
        for node in nodes
    )
    return PartPlan(
        draft.part.path,
        nodes,
        tuple(find_shared_codes(gm, nodes, [*find_means(gm, nodes, _writable(hosts, gm))])),
        tuple(_named(gm, nodes, regions, exact)),
        find_prologue(gm, draft.flow, draft.shapes, nodes, hosts),
    )


def _with_branches(drafts: Sequence[_Draft], parts: Sequence[PartPlan]) -> Iterator[PartPlan]:
    known = [(draft.part, draft.flow, draft.shapes) for draft in drafts]
    branches, macs = plan_branches(known, [part.hosts for part in parts])
    for part, own, count in zip(parts, branches, macs, strict=True):
        yield dataclasses.replace(part, branches=own, macs=count)


def _named(
    gm: fx.GraphModule, nodes: tuple[NodePlan, ...], regions: Sequence[RecomputeRegion], exact: bool
) -> Iterator[RecomputeRegion]:
    """The regions, with their place and form."""
    forms, places = FormFinder(gm, nodes, exact), {node.name: node.place for node in nodes}
    taken = [*places.values()]
    for region in regions:
        owner = common_owner(places[name] for name in region.nodes if name in places)
        place = free_name(f"{owner}.recomputed".lstrip("."), gm, taken)
        taken.append(place)
        yield dataclasses.replace(region, place=place, form=forms.form_of(region))


def _writable(hosts: tuple[HostPlan, ...], gm: fx.GraphModule) -> tuple[HostPlan, ...]:
    """Which hosts end with a convolution, whose new memory nothing else refers to."""
    nodes = {node.name: node for node in gm.graph.nodes}

    def writable(host: HostPlan) -> bool:
        node = nodes[host.last]
        while not isinstance(module_of(gm, node), CONVS):
            before = node.args[0] if node.args else None
            folded = type(module_of(gm, node)).__name__.startswith("BatchNorm")
            if not folded or not isinstance(before, fx.Node) or len(before.users) > 1:
                return False
            node = before
        return True

    return tuple(dataclasses.replace(host, inplace=writable(host)) for host in hosts)


def _input_channels(traced: Traced) -> tuple[int, int] | None:
    if not traced.parts or traced.parts[0].path:
        return None
    gm = traced.parts[0].gm
    first = next((node for node in gm.graph.nodes if node.op == "placeholder"), None)
    for user in first.users if first is not None else ():
        conv = module_of(gm, user)
        if isinstance(conv, CONVS):
            return conv.weight.dim() - 2, conv.in_channels
    return None


def _nothing_message(traced: Traced) -> str:
    kinds = {type(m).__name__ for m in traced.root.modules() if not any(True for _ in m.children())}
    reasons = "".join(
        f" {path or 'It'} stays Python: {why}." for path, why in traced.python.items()
    )
    return (
        f"{traced.network} has nothing to adapt: adapters attach to convolutions and to linear "
        f"layers before the head, and its layers are {sorted(kinds)}.{reasons}"
    )
