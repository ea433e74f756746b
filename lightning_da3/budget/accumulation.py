"""A training step on a batch as steps on parts of it, whose gradients add up.

Of every part but the last the gradients are taken at once, so that nothing of it is kept; they wait
in the loss that is returned, whose backward hands them on beside those of the last part. Whoever
gets that loss, Lightning say, may scale, log and differentiate it like any other, once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_da3.budget.microbatches import Microbatches
from lightning_da3.errors import DA3Error, InputError
from lightning_da3.model.model import DA3Model

Step = Callable[[Any], Any]


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
    model: DA3Model,
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
    ``MemoryConfig(budget=..., split="accumulate")``. The gates' budget is that of every part.

    Args:
        model: Which the step calls once.
        step: From a part of the batch to its loss, a mean over samples; or to a dict with that as
            ``"loss"``, which is taken from the last part otherwise.
        batch: Tensors with samples along axis 0, lists of samples; a tuple, list or dict of such.
        parameters: That the loss depends on; by default those of the model.
        scale: By which gradients are multiplied on the way, so that small ones do not vanish.
        unsynced: Entered around every part but the last.

    Raises:
        InputError: The batch holds no samples that can be told apart.
        ConfigError: The budget cannot be held.
        DA3Error: A part has no loss.
    """
    known = [p for p in parameters or model.parameters() if p.requires_grad]
    sums: list[Tensor | None] = [None] * len(known)
    value, fraction, count = torch.zeros(()), torch.zeros(()), samples_in_batch(batch)
    for part, samples, last in _parts(model, batch, count):
        weight = samples / count
        with _gates_of(model, weight * (model.gate_loss_scale if last else scale)):
            with contextlib.nullcontext() if last else unsynced():
                output = step(part)
            if model.executed_flops_fraction is not None:
                fraction = fraction + weight * model.executed_flops_fraction
            loss = _loss_of(output)
            if not last:
                found = torch.autograd.grad(loss * (weight * scale), known, allow_unused=True)
                sums = [_added(a, b) for a, b in zip(sums, found, strict=True)]
                value = value + weight * loss.detach()
                del output, loss, found  # and with them the part's graph
    if model.executed_flops_fraction is not None:
        model.executed_flops_fraction = fraction
    unscaled = [None if g is None else g / scale for g in sums] if scale != 1.0 else sums
    total = _Sum.apply(loss, value, weight, *known, *unscaled)
    return {**output, "loss": total} if isinstance(output, Mapping) else total


def _parts(model: DA3Model, batch: Any, count: int) -> Iterator[tuple[Any, int, bool]]:
    """Parts of the batch, their samples, and whether it is the last one.

    Of a kind of batch that is new, the first part is one sample: what the step gives the network is
    known then, and with it how large the others may be.
    """
    holder, start = model.budget_policy, 0
    kind = _kind(batch, count)
    if holder.part_of(kind) is None:
        yield _slice(batch, count, 0, 1), 1, count == 1
        holder.remember_part(kind)
        start = 1
    if start < count:
        for samples in Microbatches(holder.part_of(kind) or 1).counts(count - start):
            yield _slice(batch, count, start, samples), samples, start + samples == count
            start += samples


@contextlib.contextmanager
def _gates_of(model: DA3Model, scale: float) -> Iterator[None]:
    """A part's gates have a budget of their own: another rank may have other parts."""
    before = model.gate_loss_scale, model.gates_over_ranks
    model.gate_loss_scale, model.gates_over_ranks = scale, False
    try:
        yield
    finally:
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


# --- batches --------------------------------------------------------------------------------------


def samples_in_batch(batch: Any) -> int:
    """How many samples a batch holds: entries of its first list, or of axis 0 of its first tensor.

    Raises:
        InputError: There is neither.
    """
    first = batch
    if isinstance(batch, Mapping):
        first = next(iter(batch.values()), None)
    elif isinstance(batch, (list, tuple)):
        first = batch[0] if batch else None
    if (isinstance(first, Tensor) and first.dim()) or isinstance(first, (list, tuple)):
        return len(first)
    raise InputError(
        f"A batch of {type(batch).__name__} cannot be split: it must be a tensor with samples "
        "along axis 0 or a list of samples, or a tuple, list or dict that begins with one."
    )


def _slice(batch: Any, count: int, start: int, samples: int) -> Any:
    def entry(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.narrow(0, start, samples) if x.dim() and len(x) == count else x
        if isinstance(x, Mapping):
            return {key: entry(value) for key, value in x.items()}
        if isinstance(x, (list, tuple)) and len(x) == count:
            return x[start : start + samples]
        return x

    if isinstance(batch, (list, tuple)):
        entries: Sequence[Any] = [entry(x) for x in batch]
        if hasattr(batch, "_fields"):
            return type(batch)(*entries)
        return type(batch)(entries)
    return entry(batch)


def _kind(batch: Any, count: int) -> tuple[Any, ...]:
    """What the largest part depends on, as far as the batch tells."""

    def entry(x: Any) -> Any:
        if isinstance(x, Tensor):
            return (x.shape[x.dim() > 0 and len(x) == count :], x.dtype)
        if isinstance(x, Mapping):
            return tuple((key, entry(value)) for key, value in x.items())
        return type(x)

    return tuple(map(entry, batch)) if isinstance(batch, (list, tuple)) else (entry(batch),)
