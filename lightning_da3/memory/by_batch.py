"""Predictions of a training step for every size of its batch, from a few of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

from lightning_da3.memory.costs import StepPrediction


class BatchPrediction:
    """Predictions of one step for every size of its batch.

    Every total of the step is a constant plus a number of bytes for each sample, so that two steps
    tell all others: the peak is the largest of thousands of such lines. Where a network begins to
    split its batch, other lines begin. Where it chooses operations by the size of the batch, every
    size is predicted by itself.

    Args:
        predict: Predicts a step with a number of samples.
        cuts: Returns what `StepPredictor.cuts` returns, for the step that was predicted last.
    """

    SIZES = (2, 4)

    def __init__(
        self,
        predict: Callable[[int], StepPrediction],
        cuts: Callable[[], Iterable[tuple[int, int]]] = tuple,
    ) -> None:
        self._predict = functools.lru_cache(16)(predict)
        least = self.SIZES[0]
        self._predict(least)  # so that the cuts are known
        # a second microbatch grows until it is as large as the first; a third takes no more memory
        self._edges = {n * part * least // count for part, count in cuts() for n in (1, 2)}

    def at(self, batch_size: int) -> StepPrediction:
        """The prediction of a step with `batch_size` samples."""
        low = max((edge for edge in self._edges if edge < batch_size), default=0)
        first, second = (low + size for size in self.SIZES)
        if any(low < edge < second for edge in self._edges):
            return self._predict(batch_size)
        small, large = self._predict(first), self._predict(second)
        alike = small.names == large.names and [n.name for n in small.nodes] == [
            n.name for n in large.nodes
        ]
        if not alike:
            return self._predict(batch_size)

        def line(one: int, other: int) -> int:
            return round(one + (other - one) * (batch_size - first) / (second - first))

        def lines(one: Any, other: Any) -> Any:
            pairs = ((f.name, getattr(one, f.name), getattr(other, f.name)) for f in _fields(one))
            return dataclasses.replace(one, **{name: line(a, b) for name, a, b in pairs})

        timeline = [line(a, b) for a, b in zip(small.timeline, large.timeline, strict=True)]
        peak = max(range(len(timeline)), key=timeline.__getitem__)
        whole: StepPrediction = lines(small, large)
        return dataclasses.replace(
            whole,
            peak_bytes=timeline[peak],
            peak_node=small.names[peak],
            peak_phase=small.phase_at(peak),
            timeline=tuple(timeline),
            nodes=tuple(lines(a, b) for a, b in zip(small.nodes, large.nodes, strict=True)),
        )

    def largest(self, peak_bytes: int) -> int:
        """The largest batch whose step takes at most `peak_bytes` at its peak; 0 if none does."""
        low, high = 0, 1
        while self.at(high).peak_bytes <= peak_bytes and high < 2**30:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (
                (middle, high) if self.at(middle).peak_bytes <= peak_bytes else (low, middle)
            )
        return low


def _fields(value: Any) -> list[dataclasses.Field[Any]]:
    """The fields that grow with the batch."""
    return [f for f in dataclasses.fields(value) if f.name.split("_")[0] in ("saved", "flops")]
