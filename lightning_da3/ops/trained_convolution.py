"""Convolutions whose weight trains: the classifier of every position.

Shapes: x (N, C, *in), weight (O, C, *kernel), y (N, O, *out), one to three spatial axes.
Kept: 8-bit codes of x, for the gradient of the weight; what comes back to x is exact. Plain PyTorch
keeps x, of the network's full resolution maybe.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import grad as gradients

from lightning_da3.ops.backward import once_differentiable
from lightning_da3.ops.codes import kept_of, read_back
from lightning_da3.ops.convolution import conv_input_gradient
from lightning_da3.ops.opaque_convolution import lowered

_WEIGHT_GRADIENT: dict[int, Any] = {
    1: gradients.conv1d_weight,
    2: gradients.conv2d_weight,
    3: gradients.conv3d_weight,
}
_Geometry = tuple[Sequence[int], Sequence[int], Sequence[int]]  # stride, padding, dilation


class _TrainedConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: _Geometry
    ) -> Tensor:
        kept, ctx.how = kept_of(x, exact=False)
        ctx.geometry, ctx.size = geometry, x.size()
        ctx.save_for_backward(kept, weight)
        return torch.convolution(x, weight, bias, *geometry, False, [0] * len(geometry[0]), 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight = ctx.saved_tensors
        stride, padding, dilation = ctx.geometry
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        if needs_x:
            place = (ctx.size, stride, padding, dilation)
            grad_x = conv_input_gradient(grad, weight, *place, groups=1)
        if needs_weight:
            x = read_back(kept, ctx.how)
            gradient = _WEIGHT_GRADIENT[grad.dim() - 2]
            grad_weight = gradient(x, weight.shape, grad, stride, padding, dilation)
        if needs_bias:
            grad_bias = grad.sum([0, *range(2, grad.dim())])
        return grad_x, grad_weight, grad_bias, None


def trained_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """A convolution without groups that keeps codes of its input.

    Args:
        x: (N, C, *in).
        weight: (O, C, *kernel).
        bias: (O,), or None.
        stride: One number an axis.
        padding: Likewise, of zeros.
        dilation: Likewise.

    Returns:
        y (N, O, *out).
    """
    dtype = lowered(x, x.dtype)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    y: Tensor = _TrainedConv.apply(x.to(dtype), weight, bias, (stride, padding, dilation))
    return y
