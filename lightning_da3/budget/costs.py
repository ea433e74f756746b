"""What training steps on split batches cost, for every size of the batch, by prediction.

The peak of a step is put together from those of whole batches of every size, which two steps on
fake tensors tell (`lightning_da3.memory.BatchPrediction`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from lightning_da3.budget.microbatches import Microbatches, batch_size
from lightning_da3.budget.regions import Names, most_kept
from lightning_da3.budget.timeline import phases_of, split_timeline
from lightning_da3.errors import ConfigError
from lightning_da3.formatting import format_bytes
from lightning_da3.memory import BatchPrediction, StepPrediction, StepPredictor, resized
from lightning_da3.torch_private.trees import tree_leaves, tree_map_only

# what a microbatch costs beside its samples (reading and laying out weights, launching), in FLOPs a
# parameter: timing resnet50 and vit_b_16 with 1 to 16 samples each on two cores found 150 to 400
FLOPS_A_PARAMETER = 200
WHOLE = None
SLOWER = 0.03  # the share of a step's time that microbatches may add where there is no budget
MARGIN = 1.1  # predictions of peaks hold within a tenth


class _Moments(NamedTuple):
    """The highest totals of a step on a whole batch, in bytes, and where they are."""

    forward: tuple[int, str]
    loss: tuple[int, str]
    backward: tuple[int, str]
    optimizer: tuple[int, str]
    kept: int  # between forward and backward, outputs among it
    saved: int  # what autograd holds inside the network

    @classmethod
    def of(cls, step: StepPrediction) -> _Moments:
        """The moments of a prediction."""
        middle, end = step.forward_end, step.backward_end
        first, last = phases_of(step)

        def highest(start: int, stop: int) -> tuple[int, str]:
            i = max(range(start, stop), key=step.timeline.__getitem__, default=None)
            return (0, "") if i is None else (step.timeline[i], step.names[i])

        return cls(
            forward=highest(0, middle),
            loss=highest(first, last),
            backward=highest(middle, end),
            optimizer=highest(end, len(step.timeline)),
            kept=step.timeline[middle - 1],
            saved=sum(node.saved_bytes for node in step.nodes if node.name),
        )


class Peak(NamedTuple):
    """The highest total of a step, in bytes, and where it is."""

    bytes: int
    node: str
    phase: str


class Choice(NamedTuple):
    """How a step on a batch stays within a budget.

    Attributes:
        split: The split of the batch; None: it goes whole.
        step: What the step takes.
        parts: The samples of every microbatch; empty if the batch goes whole.
        kept: The regions that keep what they could compute again.
    """

    split: Microbatches | None
    step: StepPrediction
    parts: tuple[int, ...] = ()
    kept: Names = ()

    @property
    def again(self) -> int:
        """The number of microbatches that are computed again."""
        return 0 if self.split is None else self.split.again


class MicrobatchCosts:
    """What training steps on split batches cost, for every size of the batch.

    Args:
        predictor: Predicts steps of the network.
        predict: Predicts a step on a whole batch of so many samples.
        parameters: The number of the network's parameters.
        gradient_bytes: The size of the gradients of what trains.
        sample_bytes: The size of one sample, as it enters the network.
    """

    def __init__(
        self,
        predictor: StepPredictor,
        predict: Callable[[int], StepPrediction],
        parameters: int,
        gradient_bytes: int,
        sample_bytes: int,
    ) -> None:
        self._predictor = predictor
        self._at = functools.lru_cache(16)(BatchPrediction(predict, predictor.cuts).at)
        self._moments = functools.lru_cache(1024)(lambda samples: _Moments.of(self._at(samples)))
        self.parameters, self.gradient_bytes = parameters, gradient_bytes
        self.sample_bytes = sample_bytes

    def peak(self, count: int, split: Microbatches | None) -> Peak:
        """The peak of a step on `count` samples."""
        if split is WHOLE:
            step = self._at(count)
            return Peak(step.peak_bytes, step.peak_node, step.peak_phase)
        counts = split.counts(count)
        large, last, whole = (self._moments(n) for n in (counts[0], counts[-1], count))
        stay = sum(counts[split.again : -1]) * large.kept // counts[0]
        outputs = sum(counts[: split.again]) * max(0, large.kept - large.saved) // counts[0]
        again = sum(counts[: split.again]) * large.saved // counts[0]
        moments = [
            _later(last.forward, stay + outputs, "forward"),
            _later(last.backward, stay, "backward"),
            _later(whole.loss, -again, "loss"),
            _later(whole.optimizer, 0, "optimizer"),
        ]
        if len(counts) > 1:  # gradients of later microbatches wait for those of this one
            earlier = max(0, stay - large.kept) + self.gradient_bytes
            moments.append(_later(large.backward, earlier, "backward"))
        if split.again:
            moments.append(_later(large.forward, self.gradient_bytes, "backward"))
        return max(moments)

    def step(self, count: int, split: Microbatches | None) -> StepPrediction:
        """A step on `count` samples; its timeline is that of the whole batch."""
        whole = self._at(count)
        if split is WHOLE:
            return whole
        peak = self.peak(count, split)
        again = sum(split.counts(count)[: split.again]) / count
        nodes = tuple(
            dataclasses.replace(
                node,
                saved_bytes=round(node.saved_bytes * (1 - again)),
                flops_backward=node.flops_backward + round(node.flops_forward * again),
            )
            if node.name
            else node
            for node in whole.nodes
        )
        inputs = count * self.sample_bytes if again else 0  # computed again from them
        return dataclasses.replace(
            whole,
            saved_activation_bytes=sum(node.saved_bytes for node in nodes) + inputs,
            peak_bytes=peak.bytes,
            peak_node=peak.node,
            peak_phase=peak.phase,
            flops_backward=sum(node.flops_backward for node in nodes),
            nodes=nodes,
        )

    def over_time(self, choice: Choice) -> StepPrediction:
        """The step of a choice, with the timeline of its split: long, if that is fine."""
        if choice.split is WHOLE:
            return choice.step
        parts = choice.parts
        whole, part = self._at(sum(parts)), self._at(parts[0])
        found = split_timeline(whole, part, parts, choice.split, self.gradient_bytes)
        return dataclasses.replace(choice.step, **found)

    def accumulated(self, samples: int) -> StepPrediction:
        """A step on at most `samples` samples, whose gradients are added to those of others."""
        step = self._at(samples)
        others = self.gradient_bytes
        timeline = tuple(total + others for total in step.timeline)
        return dataclasses.replace(step, peak_bytes=step.peak_bytes + others, timeline=timeline)

    def hold(self, args: Any, kwargs: Any, budget_bytes: int) -> Choice:
        """What is decided for the step on these arguments.

        Raises:
            ConfigError: No split fits; the least possible peak, and where it is, are named.
        """
        count = batch_size(args, kwargs)
        assert count is not None  # or these costs were not known
        split = self.choose(count, budget_bytes)
        if split is not WHOLE:
            return Choice(split, self.step(count, split), tuple(split.counts(count)))
        kept, step = most_kept(self._predictor, args, kwargs, budget_bytes / MARGIN)
        return Choice(WHOLE, step, kept=kept)

    def whole(self, args: Any, kwargs: Any) -> Choice:
        """The choice of the whole batch."""
        return Choice(WHOLE, self._at(batch_size(args, kwargs) or 1))

    def lowest_peak(self, args: Any, kwargs: Any) -> Choice:
        """What is decided without a budget: the lowest peak of the steps about as fast as any."""
        count = batch_size(args, kwargs)
        assert count is not None  # or these costs were not known
        step = self._at(count)
        most = SLOWER * (step.flops_forward + step.flops_backward)
        most += self.extra_flops(count, Microbatches(count))  # which the whole batch takes as well
        splits = [
            split
            for samples in _sizes(count)
            if self.extra_flops(count, split := Microbatches(samples)) <= most
        ]
        best = min(splits, key=lambda split: self.peak(count, split).bytes, default=WHOLE)
        if best is WHOLE or self.peak(count, best).bytes >= step.peak_bytes:
            return Choice(WHOLE, step)
        return Choice(best, self.step(count, best), tuple(best.counts(count)))

    def choose(self, count: int, budget_bytes: int) -> Microbatches | None:
        """The split of `count` samples whose step fits, at the least extra time; None: the whole.

        Raises:
            ConfigError: None fits; the least possible peak, and where it is, are named.
        """
        if self._fits(count, budget_bytes):
            return WHOLE
        fitting = [
            split
            for samples in _sizes(count)
            if (split := self._least_again(count, samples, budget_bytes)) is not None
        ]
        if not fitting:
            raise ConfigError(self._impossible(count, budget_bytes))
        return min(fitting, key=lambda split: self.extra_flops(count, split))

    def largest(self, budget_bytes: int) -> int:
        """The most samples of a step that fits, its gradients beside those of steps before it.

        Raises:
            ConfigError: Not even one sample fits.
        """

        def fits(samples: int) -> bool:
            return MARGIN * self.accumulated(samples).peak_bytes <= budget_bytes

        low, high = 0, 1
        while fits(high) and high < 2**20:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        if low < 1:
            raise ConfigError(self._impossible(1, budget_bytes))
        return low

    def extra_flops(self, count: int, split: Microbatches) -> float:
        """What splitting adds to a step, in FLOPs."""
        counts = split.counts(count)
        again = sum(counts[: split.again]) * self._at(count).flops_forward / count
        starts = len(counts) + split.again / 2  # forward and backward, and once more forward
        return again + starts * FLOPS_A_PARAMETER * self.parameters

    def _fits(self, count: int, budget_bytes: int, split: Microbatches | None = WHOLE) -> bool:
        return MARGIN * self.peak(count, split).bytes <= budget_bytes

    def _least_again(self, count: int, samples: int, budget_bytes: int) -> Microbatches | None:
        """The split that fits with the fewest microbatches computed again; None if none does."""
        pieces = len(Microbatches(samples).counts(count))
        for again in range(pieces):
            split = Microbatches(samples, again)
            if self._fits(count, budget_bytes, split):
                return split
        return None

    def _impossible(self, count: int, budget_bytes: int) -> str:
        ends = [
            (Microbatches(n), Microbatches(n, len(Microbatches(n).counts(count)) - 1))
            for n in _sizes(count)
        ]
        splits = [WHOLE, *(split for both in ends for split in both)]
        least = min((self.peak(count, split) for split in splits), key=lambda peak: peak.bytes)
        return (
            f"A budget of {format_bytes(budget_bytes)} cannot be held. The smallest is "
            f"{format_bytes(MARGIN * least.bytes)}: a training step on {count} samples "
            f"takes at least {format_bytes(least.bytes)} at its peak above the resting model, at "
            f"{least.node.removeprefix('backbone.') or 'the loss'}, {least.phase}; predictions "
            "hold within a tenth. Raise the budget, or make that node smaller: smaller images, or "
            "a network with smaller maps."
        )


def _sizes(count: int) -> list[int]:
    """The samples of the largest microbatch, for every number of microbatches above one."""
    return sorted({-(-count // pieces) for pieces in range(2, count + 1)})


def _later(moment: tuple[int, str], added: int, phase: str) -> Peak:
    return Peak(moment[0] + added, moment[1], phase)


def microbatch_costs(predictor: StepPredictor, args: Any, kwargs: Any) -> MicrobatchCosts:
    """What steps of a predictor's network cost, on samples such as those of these arguments.

    Raises:
        DA3Error: The step cannot be predicted.
    """
    count = batch_size(args, kwargs)

    def other(samples: int) -> Any:
        return tree_map_only(
            Tensor,
            lambda x: resized(x, samples) if x.dim() and len(x) == count else x,
            (args, kwargs),
        )

    def predict(samples: int) -> StepPrediction:
        some, named = other(samples)
        return predictor(*some, **named)

    network = predictor.twin
    trained = [p for p in network.parameters() if p.requires_grad]
    return MicrobatchCosts(
        predictor,
        predict,
        sum(p.numel() for p in network.parameters()),
        sum(p.numel() * p.itemsize for p in trained),
        sum(
            x[:1].nbytes
            for x in tree_leaves((args, kwargs))
            if isinstance(x, Tensor) and x.dim() and len(x) == count
        ),
    )
