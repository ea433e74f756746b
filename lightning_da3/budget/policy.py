"""How training batches go through a network: in a budget, or at the lowest peak that costs no time.

Decided before the first step on a new kind of batch, by prediction.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from lightning_da3.budget.costs import WHOLE, Choice, MicrobatchCosts, microbatch_costs
from lightning_da3.budget.microbatches import Microbatches, batch_size
from lightning_da3.budget.recent import Recent
from lightning_da3.budget.regions import Names, keep_only
from lightning_da3.config import Budget, MemoryConfig
from lightning_da3.errors import ConfigError, DA3Error, InputError, PredictionWarning
from lightning_da3.formatting import bytes_in
from lightning_da3.memory import (
    NothingTrainsError,
    StepPrediction,
    StepPredictor,
    free_bytes,
    mean_of,
)
from lightning_da3.nn.recomputed import Recomputed
from lightning_da3.torch_private.fake import is_fake
from lightning_da3.torch_private.trees import tree_leaves

# Without a budget, batches of fewer bytes go whole: their steps peak at little, and what
# predictions cost would be felt.
LARGE_BYTES = 4 * 2**20
# Kinds of batches that predictions are remembered of, with a copy of the network each, and batches
# that decisions are: images may come in any number of sizes.
MOST_KINDS, MOST_CHOICES = 8, 64

# what is called of a model or of a copy of it; equal where it is the same
Called: TypeAlias = Callable[[Any], Callable[..., Any]]


class BudgetPolicy:
    """Decides how the training batches of one model go through it.

    Args:
        memory: The model's `MemoryConfig`.

    Attributes:
        budget: The budget, as in `MemoryConfig`.
        by: How it is kept, as ``MemoryConfig.split`` says.
        split: If set, how every batch is split, whatever the budget.
        predicted: What the training step of the latest batch takes; None: not known.
        tell: Called with a line for people whenever a new kind of batch is decided upon.
    """

    def __init__(self, memory: MemoryConfig) -> None:
        self.budget: Budget | None = memory.budget
        self.by: Literal["pieces", "accumulate"] = memory.split
        self.split: Microbatches | None = None
        self.predicted: StepPrediction | None = None
        self.tell: Callable[[str], object] | None = None
        self._costs = Recent[MicrobatchCosts](MOST_KINDS)
        self._chosen = Recent[Choice | None](MOST_CHOICES)
        self._keeping: tuple[Any, list[Recomputed]] | None = None  # what keeps now
        self._parts = Recent[int](MOST_CHOICES)  # the most samples of a part, by kind of batch
        self._part: int | None = None  # the same for what the network was given last

    def __getstate__(self) -> dict[str, Any]:
        """The state without what was predicted."""
        empty: dict[str, Any] = {
            "_costs": Recent(MOST_KINDS),
            "_chosen": Recent(MOST_CHOICES),
            "_keeping": None,
            "_parts": Recent(MOST_CHOICES),
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
        """Sizes of the batches met so far, and how each goes through the network."""
        return [(key[-1], c.split) for key, c in self._chosen.entries.items() if c is not None]

    def microbatches_for(
        self,
        model: Any,
        args: Any,
        kwargs: Any,
        check: Callable[[Any, Any], None],
        method: Called | None = None,
    ) -> Microbatches | None:
        """How a training batch goes through `model`; None: whole.

        Args:
            model: A DA3Model.
            args: Its arguments.
            kwargs: Its named arguments.
            check: Called with both before a batch is split for the first time; raises if it cannot.
            method: What is called of it; by default the model itself.

        Raises:
            ConfigError: The budget cannot be held.
            DA3Error: The step cannot be predicted.
        """
        if self.accumulates:
            self._part = (
                self.split.samples if self.split else self._largest(model, args, kwargs, method)
            )
            self._keep(model, ())
            return WHOLE
        if self.split is not None:
            self._keep(model, ())
            return self.split
        count = batch_size(args, kwargs)
        if not self.holds and not self._is_worth_it(model, args, kwargs):
            self.predicted = None
            return WHOLE
        if count is None:
            raise ConfigError(
                "A budget cannot be held by microbatches: the network takes no tensor with samples "
                "along axis 0 first. If the training step's loss is a mean over samples, "
                "MemoryConfig(split='accumulate') splits the step instead."
            )
        key = (method, model.skipped_now, _signature(args, kwargs, count), count)
        choice = self._chosen.get(key, lambda: self._choice(model, args, kwargs, check, method))
        self._keep(model, () if choice is None else choice.kept)
        self.predicted = None if choice is None else choice.step
        return WHOLE if choice is None else choice.split

    def _choice(
        self,
        model: Any,
        args: Any,
        kwargs: Any,
        check: Callable[[Any, Any], None],
        method: Called | None,
    ) -> Choice | None:
        """What is decided for a new kind of batch; None: it goes whole, whatever that takes."""
        count, costs = batch_size(args, kwargs), self._known_costs(model, args, kwargs, method)
        if costs is None:
            return None
        if self.budget is None:
            choice = costs.lowest_peak(args, kwargs)
            if choice.split is not WHOLE:
                try:
                    check(args, kwargs)
                except InputError:  # samples act on each other
                    choice = costs.whole(args, kwargs)
            return choice
        choice = costs.hold(args, kwargs, self.bytes_on(_device(model)))
        if choice.split is not WHOLE:
            check(args, kwargs)
        kept = len(choice.kept), len(model.plan_now.regions)
        self._say(f"a batch of {count}: {how_split(choice.parts, choice.again, kept=kept)}")
        return choice

    def _known_costs(
        self, model: Any, args: Any, kwargs: Any, method: Called | None
    ) -> MicrobatchCosts | None:
        """The costs; None of a method that trains nothing, or cannot be predicted, which is told.

        Raises:
            DA3Error: The step of the model itself cannot be predicted.
        """
        try:
            costs = self.costs_of(model, args, kwargs, method)
            if method is not None:
                costs.whole(args, kwargs)
        except NothingTrainsError:
            if method is None:
                raise
            return None
        except DA3Error as error:
            if method is None:
                raise
            warnings.warn(
                f"The budget does not count calls of {method}, which go whole: {error}",
                PredictionWarning,
                stacklevel=2,
            )
            return None
        return costs

    def _is_worth_it(self, model: Any, args: Any, kwargs: Any) -> bool:
        """Whether to look for microbatches where there is no budget: large batches on CPUs."""
        first = next(iter([*args, *kwargs.values()]), None)
        if torch.compiler.is_compiling() or (isinstance(first, Tensor) and is_fake(first)):
            return False
        if not goes_in_microbatches(model, (first,), _device(model)):
            return False
        try:
            self.costs_of(model, args, kwargs)
        except DA3Error:  # what a step takes is not known: the batch goes whole
            return False
        return True

    def _keep(self, model: Any, names: Names) -> None:
        what = names, model.skipped_now
        if self._keeping is None or self._keeping[0] != what:
            self._keeping = what, keep_only(model.network_now, names, "backbone")

    @property
    def holds(self) -> bool:
        """Whether there is a budget or a split to keep to."""
        return self.budget is not None or self.split is not None

    @property
    def accumulates(self) -> bool:
        """Whether training steps are split, not what goes through the network."""
        return self.by == "accumulate" and self.holds

    def part_of(self, kind: Any) -> int | None:
        """The most samples of a part of such a batch; None if that is not known."""
        return self._parts.entries.get(kind)

    def remember_part(self, kind: Any) -> None:
        """Remember that what the network was given last is a part of such a batch."""
        most = self._parts.get(kind, lambda: self._part or 1)
        self._say(f"training steps on at most {most} samples, whose gradients add up")

    def _say(self, what: str) -> None:
        if self.tell is not None:
            self.tell(f"Held to a budget of {self.budget}, {what}.")

    def _largest(
        self, model: nn.Module, args: Any, kwargs: Any, method: Called | None
    ) -> int | None:
        reason = "it takes no tensor with samples along axis 0 first"
        if batch_size(args, kwargs) is not None:
            try:
                costs = self.costs_of(model, args, kwargs, method)
                return costs.largest(self.bytes_on(_device(model)))
            except ConfigError:
                raise
            except DA3Error as error:
                if method is not None and isinstance(error, NothingTrainsError):
                    return self._part  # what else the step calls decides
                reason = str(error)
        warnings.warn(
            f"What a step takes is not known before it: {reason}. So every sample is a part of its "
            "own, which takes the least memory.",
            stacklevel=2,
        )
        return 1

    def costs_of(
        self, model: nn.Module, args: Any, kwargs: Any, method: Called | None = None
    ) -> MicrobatchCosts:
        """What steps on such samples cost, whatever their number.

        Args:
            model: A DA3Model.
            args: Its arguments.
            kwargs: Its named arguments.
            method: What is called of it; by default the model itself.

        Raises:
            DA3Error: The step cannot be predicted.
        """
        count = batch_size(args, kwargs)
        key = (method, model.skipped_now, _signature(args, kwargs, count))

        def make() -> MicrobatchCosts:
            predictor = StepPredictor(
                model,
                loss=None if method is None else mean_of,
                prepare=partial(without_budget, method=method),
                call=method,
            )
            return microbatch_costs(predictor, args, kwargs)

        return self._costs.get(key, make)

    def bytes_on(self, device: torch.device) -> int:
        """The budget in bytes."""
        return free_bytes(device) if self.budget == "auto" else bytes_in(self.budget)


def goes_in_microbatches(model: Any, args: Sequence[Any], device: torch.device) -> bool:
    """Whether a model looks for microbatches of such a batch where there is no budget.

    Args:
        model: A DA3Model.
        args: Its arguments.
        device: The model's device.
    """
    first = next(iter(args), None)
    large = isinstance(first, Tensor) and first.numel() * first.itemsize >= LARGE_BYTES
    return large and device.type == "cpu" and not model.plan.python


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
        again: How many of them are computed again in the backward.
        accumulated: The parts are training steps of their own.
        kept: How many regions keep, of how many that can be computed again.
    """
    if len(parts) < 2:
        room = ", and room to keep {} of {} regions that can be computed again".format(*kept)
        return f"the whole batch fits{room if kept[0] else ''}"
    most = max(parts)
    if accumulated:
        return f"{len(parts)} training steps on {most} samples at most, whose gradients add up"
    stay = f"{again} of them computed again in the backward" if again else "all kept"
    return f"the batch goes through the network in {len(parts)} pieces of {most} at most, {stay}"


def without_budget(twin: Any, method: Called | None = None) -> None:
    """Let a copy compute whole batches, without a budget, other ranks and what is skipped."""
    if method is None:
        twin.settle_()
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
