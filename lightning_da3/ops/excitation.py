"""Squeeze and excitation: channels scaled by what a small frozen network says of their means.

Shapes: x (N, C, *in); ``v = f(x)``, ``s = rest(W mean(v) + b)`` (N, C), ``y = s v``.
Kept: codes of x (x itself if exact), the few numbers ``W mean(v) + b`` and, if f's derivative
jumps, on which side x was. Both factors of the product are computed again from these; the product
and the mean are not. Plain PyTorch keeps x, v, s and what lies between.
Source: Hu, Shen, Sun, "Squeeze-and-Excitation Networks", arXiv 1709.01507.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_da3.ops.backward import once_differentiable
from lightning_da3.ops.codes import kept_of, read_back
from lightning_da3.ops.linear import cast_weight_backward, plain_linear
from lightning_da3.ops.masks import record_masks
from lightning_da3.ops.recomputed import Activation, as_before, autocast_of
from lightning_da3.ops.smooth import Smooth, widened


class Branch(NamedTuple):
    """The small network.

    Attributes:
        weight: The first layer's weight, (H, C); frozen, maybe stored in bfloat16.
        bias: The first layer's bias, (H,) or None.
        rest: What follows, (N, H) to (N, C), in operations that autograd differentiates.
    """

    weight: Tensor
    bias: Tensor | None
    rest: Callable[[Tensor], Tensor]

    def squeeze(self, v: Tensor) -> Tensor:
        """``W mean(v) + b``, (N, H)."""
        mean = v.mean(dim=tuple(range(2, v.dim())))
        return plain_linear(mean, self.weight, self.bias)


class _Excited(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        smooth: Smooth | None,
        branch: Branch,
        exact: bool,
        made: Tensor | None,
    ) -> Tensor:
        ctx.smooth, ctx.rest = smooth, branch.rest
        kept, ctx.code = kept_of(x, exact, made)
        ctx.autocast = autocast_of(x.device.type)
        with record_masks(not exact) as noted:
            v = x if smooth is None else smooth.value(smooth.settled(x))
        squeezed = branch.squeeze(v)
        y = _scaled(v, branch.rest(squeezed), overwrite=v is not x)
        ctx.save_for_backward(kept, squeezed, branch.weight, *noted)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, squeezed, weight, *noted = ctx.saved_tensors
        x = v = read_back(kept, ctx.code)
        if ctx.smooth is not None:
            x = as_before(x, ctx.smooth, noted)
            v = ctx.smooth.value(x)
        with torch.enable_grad(), ctx.autocast():
            leaf = squeezed.detach().requires_grad_()
            scale = ctx.rest(leaf)
        grad_scale = (grad * v).flatten(2).sum(2)
        (grad_squeezed,) = torch.autograd.grad(scale, leaf, grad_scale.to(scale.dtype))
        grad_mean = grad_squeezed @ cast_weight_backward(weight, grad_squeezed)
        grad_mean = _spread(grad_mean.div_(x.shape[2:].numel()).to(grad.dtype), x)
        grad_x = torch.addcmul(grad_mean, grad, _spread(scale.detach().to(grad.dtype), x))
        if ctx.smooth is not None:
            grad_x = ctx.smooth.backward(widened(grad_x), widened(x), widened(v))
        return grad_x.to(x.dtype), None, None, None, None


def _spread(values: Tensor, like: Tensor) -> Tensor:
    """(N, C) as (N, C, 1, ..)."""
    return values.view(*values.shape, *[1] * (like.dim() - 2))


def _scaled(v: Tensor, scale: Tensor, *, overwrite: bool) -> Tensor:
    scale = _spread(scale, v)
    return v.mul_(scale) if overwrite and scale.dtype == v.dtype else v * scale


def excited(
    x: Tensor,
    activation: Activation | None,
    branch: Branch,
    *,
    exact: bool = False,
    codes: Tensor | None = None,
) -> Tensor:
    """``v * s(mean(v))`` of ``v = activation(x)``.

    Args:
        x: (N, C, *in); the activation alone may overwrite it, and only where there is no graph.
        activation: f, whose backward reads its input. None: v is x.
        branch: The small network s.
        exact: Keep `x`, not its codes.
        codes: The codes of `x`, if they exist already.

    Returns:
        (N, C, *in).
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        v = x if activation is None else activation(x)
        return _scaled(v, branch.rest(branch.squeeze(v)), overwrite=activation is not None)
    smooth = None if activation is None else activation.smooth
    result: Tensor = _Excited.apply(x, smooth, branch, exact, None if exact else codes)
    return result
