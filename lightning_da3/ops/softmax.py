"""Softmax that keeps codes of its result.

Shapes: x, y: any. Kept: y in 8 bits, off by at most 1/510 of the range of its group; the value is
exact. Plain PyTorch keeps y. (Codes of x would be worse: masked values are far below the others.)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_da3.ops.backward import once_differentiable
from lightning_da3.ops.bits import dense
from lightning_da3.ops.codes import decode, encode, sample_group


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, dtype: torch.dtype | None) -> Tensor:
        y = F.softmax(x, dim, dtype=dtype)
        y_dense = dense(y)
        group = sample_group(y)
        ctx.dim, ctx.dtype = dim, x.dtype
        ctx.like = (y.size(), y_dense.stride(), y.dtype, group)
        ctx.save_for_backward(encode(y_dense, group))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (codes,) = ctx.saved_tensors
        y = decode(codes, *ctx.like)
        weighed = y * grad
        return weighed.sub_(y.mul_(weighed.sum(ctx.dim, keepdim=True))).to(ctx.dtype), None, None


def softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """`torch.softmax`.

    Args:
        x: Any shape, of a floating type.
        dim: The axis along which the result sums to 1.
        dtype: The result's type; None: that of `x`.

    Returns:
        Same shape. Keeps 8 bits an element if a gradient is needed.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return F.softmax(x, dim, dtype=dtype)
    result: Tensor = _Softmax.apply(x, dim, dtype)
    return result
