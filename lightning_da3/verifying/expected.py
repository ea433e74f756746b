"""What the user's network computes, recorded, to compare converted ones with."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import torch
from torch import nn

from lightning_da3.memory.kernels import flops
from lightning_da3.model.model import DA3Model
from lightning_da3.torch_private.fake import TorchDispatchMode
from lightning_da3.verifying.batches import Batch, Known, batch_for, other_batches
from lightning_da3.verifying.comparing import Comparison, Tolerance, compare
from lightning_da3.verifying.decisions import Decisions
from lightning_da3.verifying.own_types import in_own_types
from lightning_da3.verifying.room import NoRoom, free_for, lack_of_room
from lightning_da3.verifying.running import Conditions, Outcome, run
from lightning_da3.verifying.shadows import shadow

# FLOPs of one sample, forward. A processor's core does some 30e9 a second
THOROUGH_FLOPS = 2e9
GRADIENT_FLOPS = 1e10
MOST_FLOPS = 5e10
THOROUGH_PARAMETERS = 1e8
MOST_PARAMETERS = 3e8  # where it is not known what memory is free
_AS_ROUNDED = 2.0  # so far apart may networks be, measured by what rounding does to the original


@dataclass(frozen=True)
class Expected:
    """What the original did, pass by pass.

    Attributes:
        network: The original.
        passes: The conditions of each pass and what came of it, in order.
        dtype: Of the networks that are compared; None: their own.
        decisions: Of each pass, which converted networks make as well; empty: they make their own.
    """

    network: nn.Module
    passes: tuple[tuple[Conditions, Outcome], ...]
    dtype: torch.dtype | None
    decisions: tuple[Decisions, ...] = ()

    def compare(self, model: DA3Model) -> Iterator[Comparison]:
        """Run a converted network through the same, and compare pass by pass.

        Args:
            model: Left unchanged: a copy runs.
        """
        copied, memory = shadow(model, self.dtype), model.config.memory
        stored, wide = memory.stored_dtype or model.dtype, self.dtype == torch.double
        usual = Tolerance.of(stored, wide=wide, exact=memory.exact)
        for (conditions, theirs), made in zip_longest(self.passes, self.decisions):
            tolerance = usual
            if conditions.own is not None:
                copied = shadow(model)
                tolerance = replace(usual, outputs=max(usual.outputs, conditions.own))
            # what stays Python follows the mode, and may return something else
            copied.train(conditions.training and not model.plan.python)
            again = None if made is None else Decisions(made, tolerance.outputs)
            found = [*compare(conditions, run(copied, conditions, again), theirs, tolerance)]
            if memory.stored_dtype is not None and not all(each.ok for each in found):
                rounded = self._rounded(memory.stored_dtype, conditions)
                own = {
                    c.name: c.difference for c in compare(conditions, rounded, theirs, tolerance)
                }
                found = [
                    replace(c, tolerance=max(c.tolerance, _AS_ROUNDED * own.get(c.name, 0.0)))
                    for c in found
                ]
            yield from found

    def _rounded(self, stored: torch.dtype, conditions: Conditions) -> Outcome:
        """What the original does once its weights are rounded as they are to be stored."""
        copied = self._copy_for(conditions)
        for parameter in copied.parameters():
            if parameter.dim() > 1 and parameter.is_floating_point():
                parameter.data = parameter.data.to(stored).to(parameter.dtype)
        return run(copied, conditions)

    def with_decisions(self) -> Expected:
        """The same; converted networks decide as the original did where a rounding may decide."""
        copied = shadow(self.network, self.dtype)
        decisions = tuple(Decisions() for _ in self.passes)
        passes = []
        for (conditions, _), noted in zip(self.passes, decisions, strict=True):
            runs = copied if conditions.own is None else self._copy_for(conditions)
            passes.append((conditions, run(runs, conditions, noted)))
        return replace(self, passes=tuple(passes), decisions=decisions)

    def _copy_for(self, conditions: Conditions) -> nn.Module:
        """A copy of the original that runs under these conditions."""
        return shadow(self.network, self.dtype if conditions.own is None else None)

    def until(self, wrong: Comparison) -> Expected:
        """Only the passes up to the one in which something differed."""
        names = [conditions.name for conditions, _ in self.passes]
        last = next(i for i, name in enumerate(names) if wrong.name.endswith(f", {name}"))
        end = last + 1
        return replace(self, passes=self.passes[:end], decisions=self.decisions[:end])


class TooMuch(Exception):  # noqa: N818  # it ends a run, nobody sees it
    """A run takes more FLOPs than it may."""


def expected_of(
    network: nn.Module, known: Known, *, thorough: bool | None
) -> Expected | Exception | None:
    """Run the user's network.

    Args:
        network: Left unchanged: copies run.
        known: Of its arguments.
        thorough: In float64, in every mode and on another batch; None: if that is quick and there
            is memory for it, else briefly: one sample, as it is.

    Returns:
        What it computes; None, if that takes long; or what it raised on the last of the inputs,
        `NoRoom` where there is not even memory for a run.
    """
    lacks = lack_of_room(network)
    if lacks:
        return NoRoom(lacks)
    parameters = sum(p.numel() for p in network.parameters())
    if not thorough and parameters > MOST_PARAMETERS and free_for(network) == math.inf:
        return None  # nobody knows whether there is memory
    index, tried = _fitting(network, known, math.inf if thorough else THOROUGH_FLOPS)
    error = tried.error
    if error is not None and not isinstance(error, TooMuch):
        return error
    wide = not lack_of_room(network, torch.double)
    if thorough or (error is None and parameters <= THOROUGH_PARAMETERS and wide):
        return _thoroughly(network, known.batch(index, samples=2), tried.drew, wide=wide)
    return _briefly(network, known.batch(index, samples=1), tried.drew)


def _fitting(network: nn.Module, known: Known, most: float) -> tuple[int, Outcome]:
    """The number of the first arguments that the network takes, and what it did at last."""
    outcome = Outcome(error=ValueError("nobody says what it takes"))
    for index in range(known.choices):
        copied = shadow(network)  # a forward that fails may leave something behind
        conditions = Conditions("", batch_for(copied, known.batch(index, samples=1)))
        with _Counted(most):
            outcome = run(copied, conditions)
        if outcome.error is None or isinstance(outcome.error, TooMuch):
            return index, outcome
    return 0, outcome


def _thoroughly(
    network: nn.Module, batch: Batch, draws: bool, *, wide: bool
) -> Expected | Exception:
    """Every pass, in float64; as it is where the network's own code names other types.

    Args:
        network: See `expected_of`.
        batch: Its arguments.
        draws: It draws random numbers.
        wide: There is memory for it in float64.
    """
    for dtype in (torch.double, None) if wide else (None,):
        copied = shadow(network, dtype)
        inputs = batch_for(copied, batch)
        first = Conditions("eval, with gradients", inputs, gradients=True, draws=draws)
        outcome = run(copied, first)
        if outcome.error is None:
            passes = [(first, outcome), *_more(copied, first)]
            del copied  # in float64 it is as large as two
            passes += in_own_types(network, dtype, batch, draws=draws)
            return Expected(network, tuple(passes), dtype)
    assert outcome.error is not None
    return outcome.error


def _briefly(network: nn.Module, batch: Batch, draws: bool) -> Expected | Exception | None:
    """What does not take long: outputs, and maybe gradients."""
    copied = shadow(network)
    once = Conditions("one sample", batch_for(copied, batch), training=True, draws=draws)
    with _Counted(MOST_FLOPS) as counted:
        outcome = run(copied, once)
    if outcome.error is not None:
        return None if isinstance(outcome.error, TooMuch) else outcome.error
    passes = [(once, outcome)]
    if counted.flops <= GRADIENT_FLOPS:
        again = replace(once, name="one sample, with gradients", gradients=True)
        passes.append((again, run(copied, again)))
    passes += in_own_types(network, None, batch, draws=draws)
    return Expected(network, tuple(passes), None)


def _more(network: nn.Module, first: Conditions) -> Iterator[tuple[Conditions, Outcome]]:
    """The other passes that the network can make, after the first."""
    plain = replace(first, gradients=False)
    again = replace(plain, name="eval, again, without gradients")
    yield again, run(network, again)
    for other in other_batches(first.inputs):
        conditions = replace(plain, name="eval, another batch", inputs=other)
        copied = shadow(network)
        outcome = run(copied, conditions)
        if outcome.error is None:
            network = copied
            yield conditions, outcome
            break
    training = replace(first, name="train mode, with gradients", training=True)
    yield training, run(network, training)


class _Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts FLOPs, and ends what takes too many.

    Args:
        most: FLOPs.
    """

    def __init__(self, most: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most, self.flops = most, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        taken = flops(func, args, kwargs or {}, result)
        self.flops += taken
        if taken and self.flops > self.most:
            raise TooMuch
        return result
