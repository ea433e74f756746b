"""Frozen weights that rest in bfloat16, copied to the activations' type for one use at a time.

Shapes of the linear map: x (.., C), weight (O, C), y (.., O). Kept: nothing; the input gradient
needs the weight alone, which lives in the model. PyTorch would keep the copy.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def at_work(weight: Tensor, x: Tensor) -> Tensor:
    """A weight in the type of what it meets: one that rests in bfloat16 is copied, others are not.

    Args:
        weight: Frozen, of any shape.
        x: What it is multiplied with.
    """
    return weight.to(x.dtype) if weight.dtype == torch.bfloat16 else weight


def at_work_again(weight: Tensor, grad: Tensor) -> Tensor:
    """A weight in the type of the gradient that it meets in a backward.

    Args:
        weight: Frozen, of any shape.
        grad: What it is multiplied with; autocast may have lowered the output alone.
    """
    if torch.compiler.is_compiling() and weight.dtype != grad.dtype:
        weight = weight.clone()  # or the forward's copy would count as this one, and be kept
    return weight.to(grad.dtype)


class _RestingLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.dtype = x.dtype
        return F.linear(x, at_work(weight, x), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return (grad @ at_work_again(weight, grad)).to(ctx.dtype), None, None


def resting_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Linear map whose weight and bias get no gradient; keeps nothing for the backward.

    Args:
        x: (.., C).
        weight: (O, C), maybe resting in bfloat16.
        bias: (O,) or None.

    Returns:
        (.., O), of the type of `x`.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return F.linear(x, at_work(weight, x), bias)
    result: Tensor = _RestingLinear.apply(x, weight, bias)
    return result
