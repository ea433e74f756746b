"""Dynamic gates: the hard decision, the budget that trains it, and how it reaches the loss.

Source of the budget: Verelst, Tuytelaars, "Dynamic Convolutions: Exploiting Spatial Sparsity for
Faster Inference" (DynConv), arXiv 1912.03203.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_da3.nn.call import Executed, Place
from lightning_da3.ops.exportable import is_exportable
from lightning_da3.torch_private.fake import proxy_mode


class Recorder(Place):
    """Notes how much of one host ran in the call that runs.

    Args:
        host: Name of the host.
    """

    _is_impure = True  # what it notes, nobody reads in the graph: `torch.fx` must not drop it

    def __init__(self, host: str) -> None:
        super().__init__()
        self.host = host

    def forward(self, gate: Tensor | None, macs: float | None) -> None:
        """Note a host's gate and its multiply-accumulates."""
        ledger = self.calls.now.ledger
        if ledger is not None and gate is not None and macs is not None:
            ledger.append((self.host, Executed(gate, macs)))


def executed_fraction(executed: Sequence[Executed]) -> Tensor:
    """Share of the hosts' FLOPs that ran, a scalar in [0, 1]."""
    total = sum(host.macs for host in executed)
    # an empty batch has no cell, and so nothing to skip
    shares = [
        host.gate.mean() if host.gate.numel() else host.gate.new_ones(()) for host in executed
    ]
    weights = [host.macs / total for host in executed]
    return torch.stack([c * w for c, w in zip(shares, weights, strict=True)]).sum()


def averaged_over_ranks(fraction: Tensor) -> Tensor:
    """The mean of all ranks' values, with the gradient of this rank's own.

    The budget is a loss ``(e - target)^2`` of the whole global batch, whose e is the mean of the
    ranks' e_r. Its gradient ``2 (e - target) de`` is the mean over ranks of
    ``2 (e - target) de_r``: each rank needs the common value and its own gradient, and the average
    that DistributedDataParallel takes does the rest. A collective: every rank must call it.

    Args:
        fraction: This rank's value, for its part of the batch; a scalar.
    """
    mean = fraction.detach().clone()
    dist.all_reduce(mean)
    return fraction + (mean / dist.get_world_size() - fraction.detach())


def budget_loss(executed: Sequence[Executed], target: float, *, over_ranks: bool = False) -> Tensor:
    """``(executed / total - target)^2``: what moves the executed share of FLOPs to `target`.

    DynConv's bounds on every single layer are left out: they force gates shut before adapters have
    learned anything, where closing them slowly (`annealed_target`) lets both learn.

    Args:
        executed: How much of every host ran.
        target: Share to execute, in (0, 1].
        over_ranks: The batch is one rank's part of a global batch (`averaged_over_ranks`).

    Returns:
        A scalar.
    """
    fraction = executed_fraction(executed)
    if over_ranks:
        fraction = averaged_over_ranks(fraction)
    return (fraction - target).square()


class _WithLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, loss: Tensor, scale: float | Tensor) -> Tensor:
        ctx.scale, ctx.like = scale, (loss.dtype, loss.device)
        return output.view_as(output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dtype, device = ctx.like
        if not isinstance(ctx.scale, Tensor):
            return grad, torch.full((), ctx.scale, dtype=dtype, device=device), None
        now, unit = _largest(grad), ctx.scale
        program = not torch.compiler.is_compiling() and proxy_mode() is not None
        if program and not is_exportable():
            # it may run where a graph is built, and no program notes `detach`
            now = now.view(torch.int32).view(torch.float32)
        unit.mul_(KEEPS)
        unit.copy_(torch.where(now.isfinite() & (now > unit), now.to(unit.device), unit))
        return grad, unit.to(device, dtype, copy=True), None


KEEPS = 0.999  # of the unit of the loss from one step to the next


def _largest(grad: Tensor) -> Tensor:
    """How much the loss of a sample changes, at most, if all its outputs move by a half.

    Cross entropy with the mean over samples: the largest chance that a sample's class does not get.
    """
    if grad.dim() == 0:  # a loss by itself
        return grad.abs().float()
    axes, wide = tuple(range(1, grad.dim())), torch.promote_types(grad.dtype, torch.float32)
    each = torch.linalg.vector_norm(grad, 1, dim=axes, dtype=wide) if axes else grad.abs()
    largest = each.max() if len(each) else each.sum()  # an empty batch
    return (0.5 * len(grad) * largest).float()


def with_loss(output: Tensor, loss: Tensor, scale: float | Tensor | None = None) -> Tensor:
    """`output` unchanged, but whoever differentiates it also minimises `loss`.

    So a training step that never heard of gates trains them: its own loss needs no extra term.

    What that loss is multiplied by before the backward, by a loss scaler or because the gradients
    of several batches add up, must multiply `loss` as well. Where nobody says it, it is measured by
    the gradients of `output` that come in, which grow with it: the unit of `loss` is the largest
    change in the loss of any sample so far, which lasts when the samples have been learned. It
    forgets slowly, as loss scalers change slowly.

    Args:
        output: Any shape; must require a gradient. Samples along axis 0.
        loss: Scalar.
        scale: A factor of the loss. A tensor: the unit, zero in the beginning, which the backward
            updates; None: 1.

    Returns:
        `output`, same shape.
    """
    result: Tensor = _WithLoss.apply(output, loss, 1.0 if scale is None else scale)
    return result
