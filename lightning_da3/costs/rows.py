"""The rows of a step's costs: nodes, adapters, and regions that are computed again."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from lightning_da3.budget.regions import regions_of
from lightning_da3.formatting import format_bytes, format_count
from lightning_da3.memory import NodeCost, StepPrediction
from lightning_da3.passes.hosts import INPUTS, OUTPUTS, host_key
from lightning_da3.planning.plan import PartPlan, Plan

REST = "loss and the rest"
HEADINGS = ("node", "layer", "keeps", "bytes", "fine-tuning", "FLOPs forward", "backward")


@dataclasses.dataclass(frozen=True)
class Row:
    """One node of a plan, one adapter, or what a region keeps to be computed again.

    Attributes:
        name: The name of the node, of the host or of the region's source; unique in its kind.
        layer: What it calls, for people.
        keeps: What it keeps for the backward pass: ``"nothing"``, ``"bits"``, ``"codes"``,
            ``"recomputed"``, ``"kept"`` or ``"head"``; see `NodePlan`.
        saved_bytes: The bytes that it keeps for the backward pass.
        flops_forward: The FLOPs of its matrix products and convolutions.
        flops_backward: These FLOPs in the backward pass, with what is computed again.
        finetune_saved_bytes: What fine-tuning keeps there; None where its layers are not the same.
    """

    name: str
    layer: str
    keeps: str
    saved_bytes: int
    flops_forward: int
    flops_backward: int
    finetune_saved_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, for programs."""
        return {
            "name": self.name,
            "layer": self.layer,
            "keeps": self.keeps,
            "saved_activation_bytes": self.saved_bytes,
            "flops_forward": self.flops_forward,
            "flops_backward": self.flops_backward,
            "finetune_saved_activation_bytes": self.finetune_saved_bytes,
        }

    @property
    def cells(self) -> tuple[str, ...]:
        """The row of a printed table, below `HEADINGS`."""
        tuned = self.finetune_saved_bytes
        return (
            self.name,
            self.layer,
            self.keeps,
            format_bytes(self.saved_bytes) if self.saved_bytes else "",
            format_bytes(tuned) if tuned else "",
            format_count(self.flops_forward) if self.flops_forward else "",
            format_count(self.flops_backward) if self.flops_backward else "",
        )


def rows_of(
    plan: Plan,
    ours: StepPrediction,
    finetune: StepPrediction | None,
    kept: Sequence[str] = (),
    *,
    exact: bool = False,
) -> Iterator[Row]:
    """The rows of a step, in the order in which data meets them.

    Args:
        plan: The model's plan.
        ours: The step of one domain.
        finetune: The step of the whole network, or None.
        kept: The modules of regions that are not computed again.
        exact: Adapters and regions keep values, not their codes.
    """
    ledger = _Ledger(ours, finetune)
    regions = [region for region in regions_of(plan) if region.name in kept]
    nodes = frozenset(node for region in regions for node in region.nodes)
    for part in plan.parts:
        yield from _part_rows(part, ledger, nodes, "kept" if exact else "codes")
    yield from ledger.rest()


class _Ledger:
    """The costs of a step, and of fine-tuning, that no row lists yet."""

    def __init__(self, ours: StepPrediction, finetune: StepPrediction | None) -> None:
        self._ours = {cost.name: cost for cost in ours.nodes}
        self._finetune: dict[str, int] | None = None
        self._unnamed = 0
        if finetune is not None:
            self._finetune = {_flat(n.name): n.saved_bytes for n in finetune.nodes if n.name}
            self._unnamed = sum(n.saved_bytes for n in finetune.nodes if not n.name)

    def take(self, *names: str) -> tuple[int, int, int]:
        """Bytes and FLOPs, forward and backward, of the nodes of these names together."""
        return _total([self._ours.pop(name) for name in names if name in self._ours])

    def take_finetune(self, *names: str) -> int | None:
        """What fine-tuning keeps at the first of these names where it keeps something."""
        if self._finetune is None:
            return None
        found = (self._finetune.pop(_flat(name), 0) for name in names)
        return next((count for count in found if count), 0)

    def rest(self) -> Iterator[Row]:
        """One row of all that is left, if anything is."""
        own = _total(self._ours.values())
        other = None if self._finetune is None else sum(self._finetune.values()) + self._unnamed
        if any((*own, other)):
            yield Row(REST, "", "kept" if own[0] else "nothing", *own, other)


def _part_rows(
    part: PartPlan, ledger: _Ledger, not_again: frozenset[str], values: str
) -> Iterator[Row]:
    """The rows of one graph.

    Args:
        part: The graph's plan.
        ledger: What rows list is taken out.
        not_again: Nodes that could be computed again and are not.
        values: How adapters and regions keep what they read.
    """
    dotted = f"{part.path}." if part.path else ""
    hosts = {host.readers[0]: host for host in part.hosts}
    regions = {region.nodes[0]: region for region in part.regions}
    places = {node.name: node.place for node in part.nodes}
    for node in part.nodes:
        if node.name in regions:
            region = regions[node.name]
            found = ledger.take(f"{part.prefix}{_as_node(region.place)}")
            keeps = values if found[0] else "nothing"
            source = places.get(region.source, region.source)
            yield Row(f"{dotted}{source}", "read again", keeps, *found)
        if node.name in hosts:
            key = _as_node(host_key(hosts[node.name].name))
            found = ledger.take(*(f"{part.prefix}{place}_{key}" for place in (INPUTS, OUTPUTS)))
            keeps = values if found[0] else "nothing"
            yield Row(hosts[node.name].name, "adapter", keeps, *found)
        cost = ledger.take(part.prefix + node.name)
        keeps = node.keeps
        if keeps == "recomputed" and part.prefix + node.name in not_again:
            keeps = "kept" if cost[0] else "nothing"
        layer = part.path if part.path and node.name == "layer" else node.name
        tuned = ledger.take_finetune(f"{part.path}.{layer}", layer)
        yield Row(f"{dotted}{node.place}", node.layer, keeps, *cost, tuned)


def _as_node(name: str) -> str:
    """A module's name as names of nodes have it."""
    return re.sub(r"[^0-9A-Za-z_]", "_", name)


def _flat(name: str) -> str:
    """A name of a module or of a node: those of one layer become alike."""
    return re.sub("_+", "_", _as_node(name)).strip("_")


def _total(costs: Iterable[NodeCost]) -> tuple[int, int, int]:
    costs = list(costs)
    return (
        sum(cost.saved_bytes for cost in costs),
        sum(cost.flops_forward for cost in costs),
        sum(cost.flops_backward for cost in costs),
    )
