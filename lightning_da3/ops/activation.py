"""Piecewise linear activations that keep one bit an element.

Shapes: x, y: any. Kept: the bits of ``low < x < high`` (1/32 of float32), where the slope is 1;
everywhere else it is a constant. Plain PyTorch keeps the whole output.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_da3.ops.bits import dense, pack_between, unpack
from lightning_da3.ops.decisions import decided


class _TwoSlopes(torch.autograd.Function):
    """``x -> clamp`` or leaky ReLU; the backward is ``g`` inside, ``slope * g`` outside."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        low: float,
        high: float,
        slope: float,
        inplace: bool,
        bits: Tensor | None,
    ) -> Tensor:
        x_dense = dense(x)
        ctx.save_for_backward(pack_between(x_dense, low, high) if bits is None else bits)
        ctx.size, ctx.stride, ctx.slope = x.size(), x_dense.stride(), slope
        if not inplace:
            return _evaluate(x, low, high, slope, inplace)
        ctx.mark_dirty(x)
        _evaluate(x, low, high, slope, inplace)
        return x  # the very argument: torch.compile wants to see that

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (bits,) = ctx.saved_tensors
        inside = unpack(bits, ctx.size, ctx.stride)
        if ctx.slope == 0.0:
            # the mask first: the gradient takes the layout of the activation, whatever it came in
            return inside * grad, None, None, None, None, None
        slopes = inside.to(grad.dtype).mul_(1.0 - ctx.slope).add_(ctx.slope)
        return slopes.mul_(grad), None, None, None, None, None


def _evaluate(x: Tensor, low: float, high: float, slope: float, inplace: bool) -> Tensor:
    if slope != 0.0:
        return F.leaky_relu_(x, slope) if inplace else F.leaky_relu(x, slope)
    if low == 0.0 and math.isinf(high):
        return x.relu_() if inplace else x.relu()
    return F.hardtanh(x, low, high, inplace=inplace)


def two_slopes(
    x: Tensor,
    low: float = 0.0,
    high: float = math.inf,
    slope: float = 0.0,
    inplace: bool = False,
) -> Tensor:
    """ReLU, ReLU6, Hardtanh or leaky ReLU.

    Args:
        x: Any shape.
        low: Where the slope becomes 1.
        high: Where the slope ends to be 1.
        slope: Slope outside ``(low, high)``; if not 0, `low` must be 0 and `high` infinite.
        inplace: Write the result into `x`.

    Returns:
        The activation of `x`, same shape. Keeps 1 bit an element if a gradient is needed.
    """
    bits = decided(lambda: pack_between(dense(x), low, high))
    if not (torch.is_grad_enabled() and x.requires_grad):
        return _evaluate(x, low, high, slope, inplace)
    result: Tensor = _TwoSlopes.apply(x, low, high, slope, inplace, bits)
    return result


_SIXTH = torch.tensor(1.0 / 6.0, dtype=torch.float32).item()  # as PyTorch's, in every type


class _HardSigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: Tensor | None) -> Tensor:
        x_dense = dense(x)
        ctx.save_for_backward(pack_between(x_dense, -3.0, 3.0) if bits is None else bits)
        ctx.size, ctx.stride = x.size(), x_dense.stride()
        return F.hardsigmoid(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (bits,) = ctx.saved_tensors
        return unpack(bits, ctx.size, ctx.stride) * grad * _SIXTH, None


def hard_sigmoid(x: Tensor) -> Tensor:
    """``relu6(x + 3) / 6``; keeps 1 bit an element if a gradient is needed.

    Args:
        x: Any shape.
    """
    bits = decided(lambda: pack_between(dense(x), -3.0, 3.0))
    if not (torch.is_grad_enabled() and x.requires_grad):
        return F.hardsigmoid(x)
    result: Tensor = _HardSigmoid.apply(x, bits)
    return result
