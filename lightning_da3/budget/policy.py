"""Holding training steps to a budget: how a batch is split, decided before the step by prediction.

The peak of a step is put together from those of whole batches of every size, which two steps on
fake tensors tell (`lightning_da3.memory.BatchPrediction`).
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_da3.budget.microbatches import Microbatches, batch_size
from lightning_da3.budget.regions import Names, keep_only, most_kept
from lightning_da3.config import Budget, MemoryConfig, bytes_in
from lightning_da3.errors import ConfigError, DA3Error
from lightning_da3.formatting import format_bytes
from lightning_da3.memory import BatchPrediction, StepPrediction, StepPredictor, free_bytes, resized
from lightning_da3.nn.recomputed import Recomputed
from lightning_da3.torch_private.trees import tree_leaves, tree_map_only

# what a piece costs beside its samples (reading and laying out weights, launching), in FLOPs a
# parameter: timing resnet50 and vit_b_16 in pieces of 1 to 16 samples on two cores found 150 to 400
FLOPS_A_PARAMETER = 200
WHOLE = None
MARGIN = 1.1  # predictions of peaks hold within a tenth


class _Moments(NamedTuple):
    """The highest totals of a step on a whole batch, in bytes, and where they are."""

    forward: tuple[int, str]
    loss: tuple[int, str]
    backward: tuple[int, str]
    optimizer: tuple[int, str]
    kept: int  # between forward and backward, outputs among it
    saved: int  # by autograd, inside the network

    @classmethod
    def of(cls, step: StepPrediction) -> _Moments:
        """Those of a prediction."""
        middle, end = step.forward_end, step.backward_end
        first = last = middle
        while first > 0 and not step.names[first - 1]:
            first -= 1
        while last < end and not step.names[last]:
            last += 1

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
        split: Of the batch; None: it goes whole.
        step: What it takes.
        parts: Samples of every piece; empty if it goes whole.
        kept: Stretches that keep what they could compute again.
    """

    split: Microbatches | None
    step: StepPrediction
    parts: tuple[int, ...] = ()
    kept: Names = ()

    @property
    def again(self) -> int:
        """So many pieces are computed again."""
        return 0 if self.split is None else self.split.again


class MicrobatchCosts:
    """What training steps on split batches cost, for every size of the batch.

    Args:
        predictor: Of steps of the network.
        predict: A step on a whole batch of so many samples.
        parameters: Of the network.
        gradient_bytes: Of what trains.
        sample_bytes: Of one sample, as it enters the network.
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
        self._at = functools.cache(BatchPrediction(predict, predictor.cuts).at)
        self._moments = functools.cache(lambda samples: _Moments.of(self._at(samples)))
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
        if len(counts) > 1:  # the gradients of later pieces wait for those of this one
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

    def accumulated(self, samples: int) -> StepPrediction:
        """A step whose gradients are added to those of others, of so many samples at most."""
        step = self._at(samples)
        return dataclasses.replace(step, peak_bytes=step.peak_bytes + self.gradient_bytes)

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
            ConfigError: Not even one sample does.
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
        """With the fewest pieces that are computed again; None if even then it does not fit."""
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
    """Samples of the largest piece, for every number of pieces above one."""
    return sorted({-(-count // pieces) for pieces in range(2, count + 1)})


def _later(moment: tuple[int, str], added: int, phase: str) -> Peak:
    return Peak(moment[0] + added, moment[1], phase)


class BudgetPolicy:
    """Holds the steps of one model to a budget.

    Args:
        memory: Of its config.

    Attributes:
        budget: As of `MemoryConfig`.
        by: Likewise its `split`.
        split: If it is set, what every batch is split by, whatever the budget.
        predicted: What the training step of the batch met last takes; None: not known.
        tell: Called with a line for people whenever a new kind of batch is decided upon.
    """

    def __init__(self, memory: MemoryConfig) -> None:
        self.budget: Budget | None = memory.budget
        self.by: Literal["pieces", "accumulate"] = memory.split
        self.split: Microbatches | None = None
        self.predicted: StepPrediction | None = None
        self.tell: Callable[[str], object] | None = None
        self._costs: dict[Any, MicrobatchCosts] = {}
        self._chosen: dict[Any, Choice] = {}
        self._keeping: tuple[Names, list[Recomputed]] | None = None  # now
        self._parts: dict[Any, int] = {}  # by kind of batch, most samples
        self._part: int | None = None  # of what the network was given last

    def __getstate__(self) -> dict[str, Any]:
        """Without what was predicted."""
        empty: dict[str, Any] = {
            "_costs": {},
            "_chosen": {},
            "_keeping": None,
            "_parts": {},
            "predicted": None,
        }
        return {**vars(self), **empty}

    def hold(self, memory: MemoryConfig) -> None:
        """Keep to another budget from now on."""
        for region in self._keeping[1] if self._keeping else ():
            region.kept = False
        self.__init__(memory)  # type: ignore[misc]

    @property
    def chosen(self) -> list[tuple[int, Microbatches | None]]:
        """Sizes of the batches met so far, and how each goes through the network in pieces."""
        return [(key[-1], choice.split) for key, choice in self._chosen.items()]

    def microbatches_for(
        self, model: Any, args: Any, kwargs: Any, check: Callable[[Any, Any], None]
    ) -> Microbatches | None:
        """How a training batch goes through `model`; None: whole.

        Args:
            model: A DA3Model.
            args: Its arguments.
            kwargs: Likewise.
            check: Called with both before a batch is split for the first time; raises if it cannot.

        Raises:
            ConfigError: The budget cannot be held.
            DA3Error: The step cannot be predicted.
        """
        if self.accumulates:
            self._part = self.split.samples if self.split else self._largest(model, args, kwargs)
            self._keep(model, ())
            return WHOLE
        if self.split is not None:
            self._keep(model, ())
            return self.split
        count = batch_size(args, kwargs)
        if count is None:
            raise ConfigError(
                "A budget cannot be held by pieces: the network takes no tensor with samples along "
                "axis 0 first. If the training step's loss is a mean over samples, "
                "MemoryConfig(split='accumulate') splits the step instead."
            )
        key = (_signature(args, kwargs, count), count)
        if key not in self._chosen:
            costs = self.costs_of(model, args, kwargs)
            choice = costs.hold(args, kwargs, self.bytes_on(_device(model)))
            if choice.split is not WHOLE:
                check(args, kwargs)
            self._chosen[key] = choice
            regions_of = len(choice.kept), len(model.plan.regions)
            how = how_split(choice.parts, choice.again, kept=regions_of)
            self._say(f"a batch of {count}: {how}")
        choice = self._chosen[key]
        self._keep(model, choice.kept)
        self.predicted = choice.step
        return choice.split

    def _keep(self, model: nn.Module, names: Names) -> None:
        if self._keeping is None or self._keeping[0] != names:
            self._keeping = names, keep_only(model, names)

    @property
    def holds(self) -> bool:
        """Whether there is anything to keep to."""
        return self.budget is not None or self.split is not None

    @property
    def accumulates(self) -> bool:
        """Whether training steps are split, not what goes through the network."""
        return self.by == "accumulate" and self.holds

    def part_of(self, kind: Any) -> int | None:
        """The most samples of a part of such a batch; None if that is not known."""
        return self._parts.get(kind)

    def remember_part(self, kind: Any) -> None:
        """What the network was given last is of such a batch."""
        self._parts[kind] = self._part or 1
        self._say(f"training steps on at most {self._parts[kind]} samples, whose gradients add up")

    def _say(self, what: str) -> None:
        if self.tell is not None:
            self.tell(f"Held to a budget of {self.budget}, {what}.")

    def _largest(self, model: nn.Module, args: Any, kwargs: Any) -> int:
        reason = "it takes no tensor with samples along axis 0 first"
        if batch_size(args, kwargs) is not None:
            try:
                costs = self.costs_of(model, args, kwargs)
                return costs.largest(self.bytes_on(_device(model)))
            except ConfigError:
                raise
            except DA3Error as error:
                reason = str(error)
        warnings.warn(
            f"What a step takes is not known before it: {reason}. So every sample is a part of its "
            "own, which takes the least memory.",
            stacklevel=2,
        )
        return 1

    def costs_of(self, model: nn.Module, args: Any, kwargs: Any) -> MicrobatchCosts:
        """What steps on such samples cost, whatever their number.

        Raises:
            DA3Error: The step cannot be predicted.
        """
        count = batch_size(args, kwargs)
        key = _signature(args, kwargs, count)
        if key not in self._costs:
            predictor = StepPredictor(model, prepare=without_budget)
            self._costs[key] = microbatch_costs(predictor, args, kwargs)
        return self._costs[key]

    def bytes_on(self, device: torch.device) -> int:
        """The budget in bytes."""
        return free_bytes(device) if self.budget == "auto" else bytes_in(self.budget)


def how_split(
    parts: Sequence[int],
    again: int = 0,
    *,
    accumulated: bool = False,
    kept: tuple[int, int] = (0, 0),
) -> str:
    """How a step stays within a budget, for people.

    Args:
        parts: Samples of every part of the batch; one or none: it is not split.
        again: So many of them are computed again in the backward.
        accumulated: The parts are training steps of their own.
        kept: So many of so many regions_of keep, where they could be computed again.
    """
    if len(parts) < 2:
        room = ", and room to keep {} of {} regions_of that can be computed again".format(*kept)
        return f"the whole batch fits{room if kept[0] else ''}"
    most = max(parts)
    if accumulated:
        return f"{len(parts)} training steps on {most} samples at most, whose gradients add up"
    stay = f"{again} of them computed again in the backward" if again else "all kept"
    return f"the batch goes through the network in {len(parts)} pieces of {most} at most, {stay}"


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


def without_budget(twin: Any) -> None:
    """Let a copy compute whole batches, and by itself."""
    twin.budget_policy.hold(MemoryConfig())
    keep_only(twin, ())
    twin.gates_over_ranks = False


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _signature(args: Any, kwargs: Any, count: int | None) -> tuple[Any, ...]:
    """What a prediction depends on, the number of samples apart."""
    return tuple(_parts(args, kwargs, count))


def _parts(args: Any, kwargs: Any, count: int | None) -> Iterator[Any]:
    for x in tree_leaves((args, kwargs)):
        if not isinstance(x, Tensor):
            continue
        batched = x.dim() > 0 and len(x) == count
        yield (batched, x.shape[batched:], x.stride()[batched:], x.dtype, x.requires_grad)
        yield torch.is_autocast_enabled(x.device.type)
