"""A training step on a batch as steps on parts of it, whose gradients add up.

The gradients of every part but the last are taken at once, so that nothing else of it is kept. They
wait in the loss that is returned, whose backward hands them on beside those of the last part. That
loss may be scaled, logged and differentiated like any other, once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_da3.budget.microbatches import Microbatches, cut, samples_in
from lightning_da3.budget.policy import BudgetPolicy
from lightning_da3.choices import is_finite
from lightning_da3.errors import ConfigError, DA3Error
from lightning_da3.formatting import shown
from lightning_da3.nn.call import Calls, Noise

Step = Callable[[Any], Any]


class Budgeted(Protocol):
    """The part of a DA3Model that is used here."""

    budget_policy: BudgetPolicy
    gate_loss_scale: float | None
    gates_over_ranks: bool
    calls: Calls

    @property
    def skipped_now(self) -> frozenset[str]:
        """The branches that new calls skip."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of the network and of its domains."""


class _Sum(torch.autograd.Function):
    """``weight * loss + value``, with gradients of the parameters that are known already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, value: Tensor, weight: float, *tensors: Any) -> Tensor:
        half = len(tensors) // 2  # the parameters, and their gradients
        ctx.weight = weight
        ctx.known = [g is not None for g in tensors[half:]]
        ctx.save_for_backward(*[g for g in tensors[half:] if g is not None])
        return weight * loss + value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        found = [next(saved) * grad if known else None for known in ctx.known]
        return ctx.weight * grad, None, None, *found, *[None] * len(found)


def accumulated(
    model: Budgeted,
    step: Step,
    batch: Any,
    *,
    parameters: Iterable[nn.Parameter] | None = None,
    scale: float = 1.0,
    unsynced: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Any:
    """What ``step(batch)`` returns, in no more memory than a part of the batch takes.

        loss = accumulated(model, lambda part: cross_entropy(model(part[0]), part[1]), (x, y))
        loss.backward()

    Parts are as large as the model's budget allows, which its config must be given with
    ``MemoryConfig(budget=..., split="accumulate")``. The gates' budget holds for every part.

    Args:
        model: The `DA3Model` that the step calls once.
        step: From a part of the batch to its loss, a mean over samples; or to a dict with the loss
            as ``"loss"``, whose other entries are taken from the last part.
        batch: Tensors with samples along axis 0, lists of samples; a tuple, list or dict of such.
        parameters: The parameters that the loss depends on; by default those of the model.
        scale: A factor for the gradients on the way, so that small ones do not vanish.
        unsynced: A context that is entered around every part but the last.

    Raises:
        InputError: The samples of the batch are not known.
        ConfigError: The budget cannot be held, or `scale` is no such factor.
        DA3Error: A part has no loss.
    """
    if not (is_finite(scale) and scale > 0):
        raise ConfigError(f"`scale` must be a finite number above 0, got {shown(scale)}.")
    known = [p for p in parameters or model.parameters() if p.requires_grad]
    sums: list[Tensor | None] = [None] * len(known)
    value, fraction, count = torch.zeros(()), torch.zeros(()), samples_in(batch)
    here, noise, start = model.calls.here, Noise(count), 0
    kind = model.skipped_now, _kind(batch, count)
    for part, samples, last in _parts(model.budget_policy, kind, batch, count):
        weight, own = samples / count, noise.part(start, samples)
        start += samples
        factor = model.gate_loss_scale if last else scale
        with _gates_of(model, None if factor is None else weight * factor, own):
            with contextlib.nullcontext() if last else unsynced():
                output = step(part)
            if here.executed is not None:
                fraction = fraction + weight * here.executed
            loss = _loss_of(output)
            if not last:
                found = torch.autograd.grad(loss * (weight * scale), known, allow_unused=True)
                sums = [_added(a, b) for a, b in zip(sums, found, strict=True)]
                value = value + weight * loss.detach()
                del output, loss, found  # and with them the part's graph
    if here.executed is not None:
        here.executed = fraction
    unscaled = [None if g is None else g / scale for g in sums] if scale != 1.0 else sums
    total = _Sum.apply(loss, value, weight, *known, *unscaled)
    return {**output, "loss": total} if isinstance(output, Mapping) else total


def _parts(
    policy: BudgetPolicy, kind: Any, batch: Any, count: int
) -> Iterator[tuple[Any, int, bool]]:
    """The parts of the batch, their numbers of samples, and whether it is the last one.

    The first part of a new kind of batch is one sample: it shows what the step gives the network,
    and so how large the others may be.
    """
    counts: list[int] = []
    if policy.part_of(kind) is None:
        yield next(cut(batch, [1, count - 1], lists=True)), 1, count == 1
        policy.remember_part(kind)
        counts = [1]
    done = len(counts)
    counts += Microbatches(policy.part_of(kind) or 1).counts(count - done)
    for i, part in islice(enumerate(cut(batch, counts, lists=True)), done, None):
        yield part, counts[i], i == len(counts) - 1


@contextlib.contextmanager
def _gates_of(model: Budgeted, scale: float | None, noise: Noise) -> Iterator[None]:
    """A part's gates have a budget of their own: another rank may have other parts."""
    before = model.gate_loss_scale, model.gates_over_ranks
    model.gate_loss_scale, model.gates_over_ranks = scale, False
    model.calls.here.noise = noise
    try:
        yield
    finally:
        model.calls.here.noise = None
        model.gate_loss_scale, model.gates_over_ranks = before


def _loss_of(output: Any) -> Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise DA3Error(
            f"A training step on part of a batch returned {type(output).__name__} without a loss. "
            "MemoryConfig(split='accumulate') needs the loss of every part, a mean over samples."
        )
    return loss


def _added(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return one if other is None else other
    return one.add_(other)


def _kind(batch: Any, count: int) -> tuple[Any, ...]:
    """What the largest part depends on, as far as the batch tells."""

    def entry(x: Any) -> Any:
        if isinstance(x, Tensor):
            return (x.shape[x.dim() > 0 and len(x) == count :], x.dtype)
        if isinstance(x, Mapping):
            return tuple((key, entry(value)) for key, value in x.items())
        return type(x)

    return tuple(map(entry, batch)) if isinstance(batch, (list, tuple)) else (entry(batch),)
