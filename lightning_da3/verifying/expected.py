"""What the user's network computes, recorded, to compare converted ones with."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_da3.memory.fake import tensors_of
from lightning_da3.memory.kernels import flops
from lightning_da3.model.model import DA3Model
from lightning_da3.torch_private.fake import TorchDispatchMode
from lightning_da3.torch_private.trees import tree_map_only
from lightning_da3.verifying.batches import Batch, Known, other_batches
from lightning_da3.verifying.comparing import Comparison, Tolerance, compare
from lightning_da3.verifying.running import Conditions, Outcome, run
from lightning_da3.verifying.shadows import shadow

# of one sample, forward and backward. A processor's core does some 30 GFLOPs a second
THOROUGH_FLOPS = 4e9
BRIEF_FLOPS = 1e11
THOROUGH_PARAMETERS = 1e8
BRIEF_PARAMETERS = 3e8


@dataclass(frozen=True)
class Expected:
    """What the original did, pass by pass.

    Attributes:
        passes: The conditions of each pass and what came of it, in order.
        dtype: Of the networks that are compared; None: their own.
    """

    passes: tuple[tuple[Conditions, Outcome], ...]
    dtype: torch.dtype | None

    def compare(self, model: DA3Model) -> Iterator[Comparison]:
        """Run a converted network through the same, and compare pass by pass.

        Args:
            model: Left unchanged: a copy runs.
        """
        copied, memory = shadow(model, self.dtype), model.config.memory
        tolerance = Tolerance.of(model.dtype, memory.stored_dtype, exact=memory.exact)
        for conditions, theirs in self.passes:
            if conditions.training and model.plan.python:
                continue  # what stays Python follows the mode, and may return something else
            copied.train(conditions.training)
            yield from compare(conditions, run(copied, conditions), theirs, tolerance)


class TooMuch(Exception):  # noqa: N818  # it ends a run, nobody sees it
    """A run takes more FLOPs than it may."""


def expected_of(
    network: nn.Module, known: Known, *, thorough: bool | None
) -> Expected | Exception | None:
    """Run the user's network.

    Args:
        network: Left unchanged: a copy runs.
        known: Of its arguments.
        thorough: In float64, in every mode and on another batch; None: if that is quick, else
            briefly: one sample, one pass, as it is.

    Returns:
        What it computes; None, if that takes long; or what it raised on the last of the inputs.
    """
    parameters = sum(p.numel() for p in network.parameters())
    if not thorough and parameters > BRIEF_PARAMETERS:
        return None
    found: Expected | Exception = ValueError("nobody says what it takes")
    if thorough or parameters <= THOROUGH_PARAMETERS:
        found = _thoroughly(network, known, math.inf if thorough else THOROUGH_FLOPS)
    if not thorough and isinstance(found, Exception):
        found = _briefly(network, known, BRIEF_FLOPS)
    return None if isinstance(found, TooMuch) else found


def _thoroughly(network: nn.Module, known: Known, most: float) -> Expected | Exception:
    """Every pass, in float64; as it is where the network's own code names other types."""
    for dtype in (torch.double, None):
        found = _first(shadow(network, dtype), known, _EVAL, 2, most)
        if isinstance(found, TooMuch):
            return found
        if not isinstance(found, Exception):
            copied, conditions, outcome = found
            return Expected(((conditions, outcome), *_more(copied, conditions.inputs)), dtype)
    return found


def _briefly(network: nn.Module, known: Known, most: float) -> Expected | Exception:
    found = _first(shadow(network), known, _ONCE, 1, most)
    return found if isinstance(found, Exception) else Expected((found[1:],), None)


_EVAL = Conditions("eval", (), gradients=True)
_ONCE = Conditions("one sample", (), gradients=True, training=True)


def _first(
    network: nn.Module,
    known: Known,
    conditions: Conditions,
    samples: int,
    most: float,
) -> tuple[nn.Module, Conditions, Outcome] | Exception:
    """The first pass, on the first batch that the network takes, and who made it."""
    failed: Exception = ValueError("nobody says what it takes")
    for batch in known.batches(samples):
        copied = shadow(network)  # a forward that fails may leave something behind
        conditions = dataclasses.replace(conditions, inputs=_fitting(batch, network))
        with _Counted(most * samples):
            outcome = run(copied, conditions)
        error = outcome.error or outcome.no_gradients
        if outcome.error is None and not isinstance(error, TooMuch):
            return copied, conditions, outcome
        failed = error or failed
        if isinstance(error, TooMuch):
            break
    return failed


def _more(network: nn.Module, batch: Batch) -> Iterator[tuple[Conditions, Outcome]]:
    """The other passes that the network can make."""
    again = Conditions("eval, again, without gradients", batch)
    training = Conditions("train mode", batch, gradients=True, training=True)
    yield again, run(network, again)
    for other in other_batches(batch):
        conditions, copied = Conditions("eval, another batch", other), shadow(network)
        outcome = run(copied, conditions)
        if outcome.error is None:
            network = copied
            yield conditions, outcome
            break
    yield training, run(network, training)


def _fitting(batch: Batch, network: nn.Module) -> Batch:
    """The batch on the network's device, in float64 if that is the network's type."""
    like = next((t for t in tensors_of(network) if t.is_floating_point()), torch.empty(0))

    def cast(x: Tensor) -> Tensor:
        wide = x.is_floating_point() and like.dtype == torch.double
        return x.to(like.device, torch.double if wide else x.dtype)

    return tuple(tree_map_only(Tensor, cast, batch))


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
        self.flops += flops(func, args, kwargs or {}, result)
        if self.flops > self.most:
            raise TooMuch
        return result
