"""The memory over a step on a split batch, put together from steps on whole ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_da3.budget.microbatches import Microbatches
from lightning_da3.memory import StepPrediction


def phases_of(step: StepPrediction) -> tuple[int, int]:
    """Where in its timeline the loss begins, which has no name, and where its backward ends."""
    first = last = step.forward_end
    while first > 0 and not step.names[first - 1]:
        first -= 1
    while last < step.backward_end and not step.names[last]:
        last += 1
    return first, last


def split_timeline(
    whole: StepPrediction,
    part: StepPrediction,
    counts: Sequence[int],
    split: Microbatches,
    gradient_bytes: int,
) -> dict[str, Any]:
    """The timeline of a step in microbatches, and what belongs to it in a `StepPrediction`.

    Args:
        whole: The step on the whole batch, which the loss and the optimizer are of.
        part: The step on the largest microbatch.
        counts: The samples of every microbatch.
        split: How many of them are computed again.
        gradient_bytes: The size of the gradients, to which every microbatch adds its own.
    """
    totals: list[int] = []
    names: list[str] = []

    def add(step: StepPrediction, start: int, stop: int, more: int) -> None:
        totals.extend(total + more for total in step.timeline[start:stop])
        names.extend(step.names[start:stop])

    first, last = phases_of(part)
    kept = part.timeline[part.forward_end - 1]
    saved = min(kept, sum(node.saved_bytes for node in part.nodes if node.name))
    held, stays = 0, []  # by the microbatches before
    for i in range(len(counts)):
        add(part, 0, first, held)
        stays.append(max(0, i - split.again) * kept)
        held += kept - saved if i < split.again else kept
    loss, behind = phases_of(whole)
    gone = saved * sum(counts[: split.again]) // counts[0]
    forward_end = len(totals) + whole.forward_end - loss
    add(whole, loss, behind, -gone)
    for i in reversed(range(len(counts))):
        others = gradient_bytes if i + 1 < len(counts) else 0
        if i < split.again:
            add(part, 0, first, others)
        add(part, last, part.backward_end, stays[i] + others)
    backward_end = len(totals)
    add(whole, whole.backward_end, len(whole.timeline), 0)
    return {
        "timeline": tuple(totals),
        "names": tuple(names),
        "forward_end": forward_end,
        "backward_end": backward_end,
    }
