"""Passes in the types that a network has, and in the precision that it will be used in.

In float64 rounding does not blur what is compared, and a forward that decides on types decides
otherwise. So the outputs are compared once more as they are, if only roughly: rounding goes another
way through a converted network, and how far that takes it is measured on the original, with weights
that are rounded otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from lightning_da3.memory.fake import tensors_of
from lightning_da3.tracing.autocast import Precision, precision_now
from lightning_da3.verifying.batches import Batch, batch_for
from lightning_da3.verifying.comparing import Tolerance, compare
from lightning_da3.verifying.room import lack_of_room
from lightning_da3.verifying.running import Conditions, Outcome, run
from lightning_da3.verifying.shadows import shadow

_LEAST = {False: 0.01, True: 0.05}  # without autocast and with it
_MOST = 0.25  # where rounding may come to more, a difference says nothing
_TIMES = 4.0  # what other rounding comes to


def in_own_types(
    network: nn.Module, dtype: torch.dtype | None, batch: Batch, *, draws: bool
) -> Iterator[tuple[Conditions, Outcome]]:
    """The passes of a network that other ones are compared with.

    Args:
        network: Left unchanged: copies run.
        dtype: Of the networks that are compared otherwise; None: their own.
        batch: Its arguments.
        draws: It draws random numbers.
    """
    if lack_of_room(network, own=True):  # for a copy with other weights
        return
    precision = precision_now()
    has = {t.dtype for t in tensors_of(network) if t.is_floating_point()}
    if dtype is not None and has != {dtype}:
        yield from _compared(network, batch, (), "eval, in its own types", draws)
    if precision:
        yield from _compared(network, batch, precision, "eval, under autocast", draws)


def _compared(
    network: nn.Module, batch: Batch, precision: Precision, name: str, draws: bool
) -> Iterator[tuple[Conditions, Outcome]]:
    """The pass, unless it fails, or rounding decides what comes of it."""
    copied = shadow(network)
    inputs = batch_for(copied, batch)
    conditions = Conditions(name, inputs, draws=draws, own=0.0, precision=precision)
    outcome = run(copied, conditions)
    if outcome.error is not None:
        return
    other = run(_rounded_otherwise(network, precision), conditions)
    nothing = Tolerance(0.0, 0.0)
    noise = max((c.difference for c in compare(conditions, other, outcome, nothing)), default=0.0)
    most = max(_LEAST[bool(precision)], _TIMES * noise)
    if most <= _MOST:
        again = Conditions(name, inputs, draws=draws, own=most, precision=precision)
        yield again, outcome


def _rounded_otherwise(network: nn.Module, precision: Precision) -> nn.Module:
    """A copy whose weights differ by about what rounding them does."""
    copied, numbers = shadow(network), torch.Generator().manual_seed(0)
    lowered = [torch.finfo(dtype).eps for _, dtype in precision]
    for parameter in copied.parameters():
        if parameter.is_floating_point():
            eps = max([torch.finfo(parameter.dtype).eps, *lowered])
            drawn = torch.rand(parameter.shape, generator=numbers).sub_(0.5).mul_(eps).add_(1.0)
            drawn = drawn.to(parameter.device)  # with a narrow parameter the product is as wide
            parameter.data = (parameter.data * drawn).to(parameter.dtype)
    return copied
