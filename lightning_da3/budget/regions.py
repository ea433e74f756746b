"""Where a budget has room: which regions of a network keep what they would compute again.

By default a region keeps 8-bit codes of what it reads, or what it reads itself, and runs once more
in the backward. Its operations can also keep what they keep by themselves: bits, codes of
derivatives, and what PyTorch keeps of the rest. That costs bytes and saves FLOPs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

from torch import nn

from lightning_da3.memory import StepPrediction, StepPredictor
from lightning_da3.nn.recomputed import Recomputed
from lightning_da3.planning.plan import Plan

Names = tuple[str, ...]


def keep_only(model: nn.Module, names: Collection[str], prefix: str = "") -> list[Recomputed]:
    """Let these regions of a DA3Model, and no others, keep instead of computing again.

    Args:
        model: The model, or the part of it that computes.
        names: Names of the regions' modules in the model.
        prefix: What the model calls that part.

    Returns:
        The regions that keep.
    """
    kept = []
    for name, module in model.named_modules(prefix=prefix):
        if isinstance(module, Recomputed):
            module.kept = name in names
            kept += [module] if module.kept else []
    return kept


class NamedRegion(NamedTuple):
    """One region that is computed again.

    Attributes:
        name: The name of its module.
        nodes: Names of what it consists of, as predictions say them.
    """

    name: str
    nodes: frozenset[str]


def regions_of(plan: Plan) -> Iterator[NamedRegion]:
    """The regions of a DA3Model with this plan."""
    for part in plan.parts:
        for region in part.regions:
            nodes = frozenset(f"{part.prefix}{node}" for node in region.nodes)
            yield NamedRegion(f"{part.prefix}{region.place}", nodes)


def most_kept(
    predictor: StepPredictor, args: Sequence[Any], kwargs: dict[str, Any], most_bytes: float
) -> tuple[Names, StepPrediction]:
    """The regions that keep, most FLOPs saved for a byte first, as many as a peak allows.

    Args:
        predictor: Predicts steps of a DA3Model.
        args: The step's arguments.
        kwargs: The step's named arguments.
        most_bytes: The highest predicted peak; a step that keeps the least must stay below.

    Returns:
        The names of their modules, and the prediction of the step.

    Raises:
        DA3Error: The step cannot be predicted.
    """
    twin: Any = predictor.twin
    known = list(regions_of(twin.plan))

    def step(names: Collection[str]) -> StepPrediction:
        keep_only(twin, names)
        try:
            return predictor(*args, **kwargs)
        finally:
            keep_only(twin, ())

    least, most = step(()), step([region.name for region in known])
    if most.peak_bytes <= most_bytes:
        return tuple(region.name for region in known), most
    order = [region.name for region in sorted(known, key=lambda s: _price(s, least, most))]
    low, high, best = 0, len(order), least
    while high - low > 1:
        middle = (low + high) // 2
        found = step(order[:middle])
        if found.peak_bytes <= most_bytes:
            low, best = middle, found
        else:
            high = middle
    return tuple(order[:low]), best


def _price(region: NamedRegion, least: StepPrediction, most: StepPrediction) -> float:
    """The bytes that one FLOP that is not computed twice costs."""
    again = sum(node.flops_forward for node in least.nodes if node.name in region.nodes)
    own = frozenset({region.name, *region.nodes})
    kept, before = (
        sum(node.saved_bytes for node in step.nodes if node.name in own) for step in (most, least)
    )
    return (kept - before) / max(1, again)
