"""Batch norm with frozen statistics: a per-channel affine map.

Shapes: x (N, C, *in), scale and shift (C,). Kept: nothing but the scale, which lives in the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_da3.ops.backward import once_differentiable


def _channels(vector: Tensor, x: Tensor) -> Tensor:
    return vector.view(-1, *[1] * (x.dim() - 2))  # (C, 1, ..)


def _evaluate(x: Tensor, scale: Tensor, shift: Tensor, inplace: bool) -> Tensor:
    scale, shift = _channels(scale, x), _channels(shift, x)
    return x.mul_(scale).add_(shift) if inplace else torch.addcmul(shift, x, scale)


class _FrozenAffine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, inplace: bool) -> Tensor:
        ctx.save_for_backward(scale)
        if not inplace:
            return _evaluate(x, scale, shift, inplace)
        ctx.mark_dirty(x)
        _evaluate(x, scale, shift, inplace)
        return x  # the argument itself, as torch.compile needs it

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = ctx.saved_tensors
        return grad * _channels(scale, grad), None, None, None


def frozen_affine(x: Tensor, scale: Tensor, shift: Tensor, inplace: bool = False) -> Tensor:
    """``x * scale + shift`` by channel; keeps nothing for the backward.

    Args:
        x: (N, C, *in).
        scale: (C,), frozen.
        shift: (C,), frozen.
        inplace: Write the result into `x`.

    Returns:
        Same shape as `x`.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return _evaluate(x, scale, shift, inplace)
    result: Tensor = _FrozenAffine.apply(x, scale, shift, inplace)
    return result
