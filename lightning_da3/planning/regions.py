"""Which frozen nodes are computed again in the backward, and from what.

An operation that keeps its operands (a smooth activation, a norm, a product, attention) keeps them
for one derivative. Going back from it, through whatever is cheap to compute, leads to a value that
is smaller, or from which other such operations can be computed as well: it is kept instead of all.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Container, Iterator, Mapping, Sequence

from torch import fx, nn

from lightning_da3.layers import (
    CONVS,
    facts_of_call,
    has_hooks,
    is_in_place,
    is_pure,
    layer_may_draw,
    may_draw,
)
from lightning_da3.planning.aliases import find_writers
from lightning_da3.planning.conditioning import Conditioning, is_of_many
from lightning_da3.planning.flow import Flow, Nodes, dominators
from lightning_da3.planning.frontiers import FrontierFinder, leads_back
from lightning_da3.planning.layers import has_weights
from lightning_da3.planning.plan import HostPlan, NodePlan, RecomputeRegion
from lightning_da3.tracing.graphs import module_of

# passing a convolution or a matrix product must make the kept value at least so much smaller
WORTH = 2.0
SQUEEZED = 16.0  # a mean over so many elements is not rounded


@dataclasses.dataclass
class _Region:
    sources: list[fx.Node]
    keepers: list[fx.Node]
    inside: Nodes
    frozen: list[fx.Node]  # features that it reads, and nothing trainable is upstream of

    @property
    def plan(self) -> RecomputeRegion:
        first, *others = (source.name for source in self.sources)
        frozen = tuple(node.name for node in self.frozen)
        return RecomputeRegion(
            first, tuple(n.name for n in self.inside), also=tuple(others), frozen=frozen
        )


class RegionFinder:
    """Finds the regions of one graph.

    Args:
        gm: The traced graph.
        flow: The flow of data in it.
        size: Elements of every node's value.
        shapes: Shapes of nodes whose value is one tensor; empty if nothing is known.
        nodes: What becomes of every node.
        hosts: The graph's hosts.
        inputs: Placeholders whose value may be trained already.
        head: Module name of the classifier.
        exact: Values are kept as they are, not as codes.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        flow: Flow,
        size: dict[fx.Node, float],
        shapes: Mapping[fx.Node, tuple[int, ...]],
        nodes: tuple[NodePlan, ...],
        hosts: tuple[HostPlan, ...],
        inputs: Sequence[fx.Node],
        head: str | None,
        exact: bool,
    ) -> None:
        self.gm, self.flow, self.size, self.head, self.exact = gm, flow, size, head, exact
        read = [node for node in flow.nodes if node.op == "placeholder" and node.users]
        island = any(node.op == "placeholder" for node in inputs)
        self.doors = flow.tensors_in(read, shapes) if island else []  # what an island reads
        self.shapes = shapes
        self.tensors = shapes or {node for node in flow.nodes if self._gives_one_tensor(node)}
        self.plan = {node.name: node for node in nodes}
        self.writers = find_writers(gm, self.plan)
        self.written = {host.last for host in hosts}
        self.readers = {host.source: host.readers for host in hosts}
        self.trained: Nodes = {}
        for node in flow.activations:
            if node in inputs or node.name in self.written or self._sources(node):
                self.trained[node] = None
        self.features: set[fx.Node] = set()
        for node in flow.activations:
            weighs = has_weights(gm, node) if node.op == "call_module" else False
            if weighs or any(i in self.features for i in flow.inputs(node)):
                self.features.add(node)
        self.before = dominators(self.trained, self._sources)
        self.ill = set() if exact else Conditioning(gm, self.trained).ill(flow.nodes)

    def _gives_one_tensor(self, node: fx.Node) -> bool:
        """Whether it does, if shapes are unknown: layers do, unless they return tuples."""
        if module_of(self.gm, node) is not None:
            return not _is_unpacked(node)
        facts = facts_of_call(node)
        return facts.elementwise or facts.does == "concatenation"

    def find(self) -> list[RecomputeRegion]:
        """Every region, in order."""
        regions = [region for region in self._one_by_one() if self._saves(region) > 0.0]
        regions = self._of_several(regions)
        whole = self._island()
        if whole is not None and self._saves(whole) > sum(map(self._saves, regions)):
            regions = [whole]
        return [region.plan for region in regions]

    def _island(self) -> _Region | None:
        """A region of all that keeps anything, from all an island reads, if that is far less."""
        keepers = [node for node in self.trained if self._keeps(node)]
        if not self.doors or not keepers:
            return None
        region = self._region(self.doors, keepers)
        if region is None:
            return None
        enough = 1.0 if self.exact else WORTH
        alone = sum(map(self._alone, region.keepers))
        return region if enough * sum(map(self._cost, region.sources)) <= alone else None

    def _one_by_one(self) -> list[_Region]:
        """Regions that keep one value each."""
        found: dict[fx.Node, _Region] = {}
        covered: set[fx.Node] = set()
        for node in reversed(self.trained):
            if node in covered or not self._keeps(node):
                continue
            region = self._best(node)
            if region is None or covered & set(region.inside):
                continue
            (source,) = region.sources
            other = found.get(source)
            if other is not None:
                region = self._region([source], region.keepers + other.keepers)
            if region is None:
                continue
            found[source] = region
            covered |= set(region.inside)
        return sorted(found.values(), key=lambda s: self.flow.position[s.sources[0]])

    def _of_several(self, regions: list[_Region]) -> list[_Region]:
        """The regions, and what is left computed again from several values, if it saves.

        As attention, where a host lies on the way of its keys, or the classifier of maps that are
        the sum of others. Regions that have anything in common become one.
        """
        for node in reversed(self.trained):
            if any(node in region.inside for region in regions) or not self._alone(node):
                continue
            for sources in self._frontiers(node, {s for r in regions for s in r.sources}):
                inside = {*self.flow.behind_any(sources, [node])}
                near = [r for r in regions if inside & {*r.inside} or {*r.sources} & {*sources}]
                region = self._joined(near, sources, node)
                if region is not None and self._saves(region) > sum(map(self._saves, near)):
                    regions = [*[r for r in regions if r not in near], region]
                    break
        return sorted(regions, key=lambda s: self.flow.position[s.sources[0]])

    def _frontiers(self, node: fx.Node, kept: Container[fx.Node]) -> Iterator[list[fx.Node]]:
        """What a node that keeps much may be computed from, the least to keep first."""

        def cost(source: fx.Node) -> float:
            return 0.0 if source in kept or not self._is_feature(source) else self._cost(source)

        def again(source: fx.Node) -> bool:
            return source in self.trained and self._may_run_again(source, [])

        if not self._may_run_again(node, [], with_hosts=self._is_head(node)):
            return
        finder = FrontierFinder(self.flow, cost, again, self._is_heavy)
        for values in finder.find(node, self._alone(node), WORTH):
            sources = [n for n in values if n in self.trained]
            one_each = sources and all(n in self.tensors for n in sources)
            if one_each and not any(map(self._is_squeezed, sources)):
                yield sources

    def _joined(
        self, near: Sequence[_Region], sources: Sequence[fx.Node], node: fx.Node
    ) -> _Region | None:
        all_of = {*sources, *[source for region in near for source in region.sources]}
        ends = [keeper for region in near for keeper in region.keepers]
        ordered = sorted(all_of, key=self.flow.position.__getitem__)
        region = self._region(ordered, [*ends, node])
        if region is None or leads_back(self.flow, region.inside, region.sources):
            return None
        return region

    def _is_head(self, node: fx.Node) -> bool:
        return node.op == "call_module" and str(node.target) == self.head

    def _reads_positions(self, node: fx.Node) -> bool:
        """Whether it reads more than one row of features, whose rounding is not worth it."""
        return any(len(self.shapes.get(i, ())) > 2 for i in self._sources(node))

    def pure(self) -> dict[fx.Node, bool]:
        """Which nodes may run a second time, with hosts and their adapters, and the head."""
        nowhere = self.flow.nodes[-1]
        return {
            node: self._may_run_again(node, [nowhere], with_hosts=True) for node in self.flow.nodes
        }

    # --- one keeper -------------------------------------------------------------------------------

    def _sources(self, node: fx.Node) -> list[fx.Node]:
        return [i for i in self.flow.inputs(node) if i in self.trained]

    def _keeps(self, node: fx.Node) -> bool:
        planned = self.plan.get(node.name)
        return planned is not None and planned.keeps in ("kept", "codes")

    def _alone(self, node: fx.Node) -> float:
        """What a node keeps by itself, in elements of one byte."""
        head = self._is_head(node) and self._reads_positions(node)
        if not (head or self._keeps(node)):
            return 0.0
        coded = head and not self.exact and isinstance(module_of(self.gm, node), CONVS)
        unit = 1.0 if coded or self.plan[node.name].keeps == "codes" else 4.0
        operands = dict.fromkeys(self.flow.inputs(node))
        return unit * sum(self.size[i] for i in operands if self._is_feature(i))

    def _best(self, keeper: fx.Node) -> _Region | None:
        """The region that ends with `keeper` and saves the most, or None if none saves."""
        best, most = None, 0.0
        source = self.before[keeper]
        while source is not None:
            if source not in self.tensors or self._is_squeezed(source):
                source = self._step(source)
                continue
            region = self._region([source], [keeper])
            if region is None:
                break
            saved = self._saves(region)
            if saved > most * 1.01:
                best, most = region, saved
            source = self._step(source)
        return best

    def _is_squeezed(self, node: fx.Node) -> bool:
        """Whether so little is left of many positions that rounding it is not worth its error."""
        sizes = [self.size[i] for i in self._sources(node)]
        return is_of_many(self.gm, node) and self.size[node] * SQUEEZED <= max(sizes, default=0.0)

    def _cost(self, source: fx.Node) -> float:
        return self.size[source] * (4.0 if self.exact else 1.0)

    def _step(self, node: fx.Node) -> fx.Node | None:
        """Where the kept value may lie before `node`, if computing `node` again is allowed."""
        before = self.before[node]
        if before is None or node.name in self.written:
            return None
        smaller = self.size[node] / max(1.0, self.size[before])
        heavy = any(self._is_heavy(n) for n in self.flow.between(before, [node]))
        enough = WORTH if heavy and not self.exact else 1.0
        return before if smaller >= enough else None

    def _is_heavy(self, node: fx.Node) -> bool:
        if self._keeps(node):
            return False  # attention is computed again for itself already
        return isinstance(module_of(self.gm, node), (nn.Linear, *CONVS))

    # --- regions ---------------------------------------------------------------------------------

    def _region(self, sources: list[fx.Node], ends: list[fx.Node]) -> _Region | None:
        inside = self.flow.behind_any(sources, ends)
        heads = [node for node in ends if self._is_head(node)]
        if not all(self._may_run_again(n, sources, with_hosts=n in heads) for n in inside):
            return None
        names = {node.name for node in inside}
        if any(names & set(self.readers.get(name, ())) for name in names):
            return None  # a host begins inside
        read = {i: None for node in inside for i in node.all_input_nodes if i not in inside}
        sources = [source for source in sources if source in read]  # others lead to these alone
        if not sources or any(i in self.trained and i not in sources for i in read):
            return None
        if self.exact and any(self.writers.get(i, set()) - inside.keys() for i in sources):
            return None  # it is kept as it is, and overwritten behind the region
        keepers = [node for node in inside if node in self.trained and self._alone(node)]
        frozen = [i for i in read if i not in self.trained and self._is_feature(i)]
        return _Region(sources, keepers, inside, frozen)

    def _is_feature(self, node: fx.Node) -> bool:
        """Whether a value comes from layers with weights, and is no mask, table or number."""
        return node in self.trained or (node in self.features and node in self.tensors)

    def _may_run_again(
        self, node: fx.Node, sources: list[fx.Node], *, with_hosts: bool = False
    ) -> bool:
        trains = str(node.target) == self.head or node.name in self.written
        if trains and not with_hosts:
            return False
        if node.op in ("placeholder", "output", "get_attr"):
            return False
        over = [source for source in sources if node in self.writers.get(source, ())]
        if over and not self._may_be_kept_from_writing(node, sources):
            return False
        planned = self.plan.get(node.name)
        if planned is not None and planned.action == "remove":
            return True
        decided = planned is not None and planned.action == "replace"  # and kept in bits
        if not (self.exact or decided) and node in self.ill:
            return False
        layer = module_of(self.gm, node)
        if layer is not None:  # hooks run once, and graphs in the graph may train
            alone = has_hooks(layer) or isinstance(layer, fx.GraphModule)
            return not (alone or layer_may_draw(layer))
        pure = node.op == "call_method" or is_pure(node.target)
        return pure and not may_draw(node.target, node.args, node.kwargs)

    def _may_be_kept_from_writing(self, node: fx.Node, sources: list[fx.Node]) -> bool:
        """Whether a region's first operation can leave its input alone, and nobody would see it."""
        if len(sources) > 1 or not self._alone_reads(node, sources[0]):
            return False
        if node.op != "call_function":
            return node.op == "call_module"
        planned = self.plan.get(node.name)
        if is_in_place(node):  # as torch.tanh_ is, whatever it is told
            return planned is not None and planned.action == "replace"
        return bool(node.kwargs.get("inplace")) or (planned is not None and planned.inplace)

    def _alone_reads(self, node: fx.Node, source: fx.Node) -> bool:
        """Whether `node` alone reads `source`, maybe past what is gone in the converted network."""
        first = node.args[0]
        while isinstance(first, fx.Node) and len(first.users) == 1:
            if first is source:
                return True
            if first.name not in self.plan or not self.plan[first.name].gone:
                return False
            first = first.args[0]
        return False

    def _saves(self, region: _Region) -> float:
        kept = (*region.sources, *region.frozen)
        return sum(map(self._alone, region.keepers)) - sum(map(self._cost, kept))


def _is_unpacked(node: fx.Node) -> bool:
    """Whether what `node` returns may be a tuple."""
    items = [user for user in node.users if user.target is operator.getitem]
    return any(isinstance(item.args[1], int) for item in items)
