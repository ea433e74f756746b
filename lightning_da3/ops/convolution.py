"""Convolutions with frozen weights.

Shapes: x (N, C, *in), weight (O, C/groups, *kernel), y (N, O, *out), one to three spatial axes.
Kept: nothing. The input gradient is a transposed convolution with the weight, which lives in the
model. Plain PyTorch keeps the whole input, although only a weight gradient would need it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_da3.ops.backward import once_differentiable
from lightning_da3.ops.bits import layout_of, reshaped
from lightning_da3.ops.linear import cast_weight, cast_weight_backward, is_fast, product
from lightning_da3.ops.opaque_convolution import is_opaque, lowered, opaque_convolution


class _Geometry(NamedTuple):
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


class _FrozenConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: _Geometry,
    ) -> Tensor:
        ctx.size, ctx.dtype, ctx.geometry = x.size(), x.dtype, geometry
        ctx.layout = layout_of(x)
        ctx.save_for_backward(weight)
        return conv(x, weight, bias, *geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        grad_x = conv_input_gradient(grad, weight, ctx.size, *ctx.geometry)
        return grad_x.to(ctx.dtype).contiguous(memory_format=ctx.layout), None, None, None


_PLAIN = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}  # autocast knows these


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The convolution by PyTorch's fastest operation; arguments as in `frozen_conv`."""
    if is_opaque(weight):
        return opaque_convolution(
            x, weight, bias, stride, padding, dilation, groups, lowered(x, x.dtype)
        )
    weight = cast_weight(weight, x)
    if _is_pointwise(weight, padding, groups) and _fast_matmul(x, weight):
        return _pointwise(_every(x, stride), weight.flatten(1), bias)
    plain = _PLAIN[len(stride)]
    return plain(x, weight, bias, list(stride), list(padding), list(dilation), groups)


def conv_input_gradient(
    grad: Tensor,
    weight: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """dL/dx of ``y = conv(x, weight)`` from dL/dy and the weight alone.

    Args:
        grad: dL/dy, (N, O, *out).
        weight: (O, C/groups, *kernel), maybe stored in bfloat16.
        size: Shape of x, (N, C, *in).
        stride: The convolution's stride, one number an axis.
        padding: Zeros on both sides, one number an axis.
        dilation: The kernel's dilation, one number an axis.
        groups: The number of groups of channels.

    Returns:
        dL/dx, (N, C, *in).
    """
    weight = weight if is_opaque(weight) else cast_weight_backward(weight, grad)
    if weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last):
        grad = grad.contiguous(memory_format=torch.channels_last)  # as y was: see FrozenConv
    if _is_pointwise(weight, padding, groups) and _fast_matmul(grad, weight):
        grad_x = _pointwise(grad, weight.flatten(1).t(), None)
        if max(stride) == 1:
            return grad_x
        spread = grad_x.new_zeros(size).to(memory_format=torch.channels_last)
        _every(spread, stride).copy_(grad_x)
        return spread
    if grad.is_cpu and _turns(weight, stride, padding, dilation, groups) and not is_opaque(weight):
        # oneDNN is slower with gradients of large depthwise kernels than with convolutions
        turned = weight.flip([*range(2, weight.dim())])
        sides = zip(dilation, weight.shape[2:], padding, strict=True)
        around = [d * (k - 1) - p for d, k, p in sides]
        return conv(grad, turned, None, stride, around, dilation, groups)
    rest = [0] * len(stride)
    if max(stride) > 1:  # rows and columns of x that no window reached
        rest = [
            n - ((o - 1) * s - 2 * p + d * (k - 1) + 1)
            for n, o, s, p, d, k in zip(
                size[2:], grad.shape[2:], stride, padding, dilation, weight.shape[2:], strict=True
            )
        ]
    if is_opaque(weight):
        return opaque_convolution(
            grad, weight, None, stride, padding, dilation, groups, grad.dtype, rest
        )
    return torch.convolution(grad, weight, None, stride, padding, dilation, True, rest, groups)


def _is_pointwise(weight: Tensor, padding: Sequence[int], groups: int) -> bool:
    return weight.shape[2:] == (1, 1) and groups == 1 and max(padding) == 0


def _turns(
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> bool:
    """Whether the input gradient is the same convolution with the kernel turned around."""
    depthwise = groups == len(weight) and weight.shape[1] == 1
    sides = zip(dilation, weight.shape[2:], padding, strict=True)
    return depthwise and max(stride) == 1 and all(p <= d * (k - 1) for d, k, p in sides)


def _fast_matmul(x: Tensor, weight: Tensor) -> bool:
    return is_fast(x, weight) and x.is_contiguous(memory_format=torch.channels_last)


def _every(x: Tensor, stride: Sequence[int]) -> Tensor:
    """The pixels that a strided pointwise convolution reads."""
    return x if max(stride) == 1 else x[:, :, :: stride[0], :: stride[1]]


def _pointwise(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """(N, C, H, W) times (O, C) over the channels: (N, O, H, W), channels_last."""
    n, _, h, w = x.shape
    rows = reshaped(x.permute(0, 2, 3, 1), n * h * w, -1)  # (N*H*W, C), a view if channels_last
    y = product(rows, matrix, bias)
    o = len(matrix)
    # in place, as autograd forbids to write into views that a custom Function made
    return y.as_strided_((n, o, h, w), (h * w * o, 1, w * o, o))


def frozen_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Convolution whose weight and bias get no gradient; keeps nothing for the backward.

    Args:
        x: (N, C, *in).
        weight: (O, C/groups, *kernel).
        bias: (O,) or None.
        stride: The convolution's stride, one number an axis.
        padding: Zeros on both sides, one number an axis.
        dilation: The kernel's dilation, one number an axis.
        groups: The number of groups of channels.

    Returns:
        (N, O, *out).
    """
    geometry = _Geometry(tuple(stride), tuple(padding), tuple(dilation), groups)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return conv(x, weight, bias, *geometry)
    result: Tensor = _FrozenConv.apply(x, weight, bias, geometry)
    return result


class _FrozenConvTranspose(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.dtype, ctx.geometry, ctx.layout = x.dtype, geometry, layout_of(x)
        return _conv_transpose(x, weight, bias, *geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        stride, padding, _, groups, dilation = ctx.geometry
        if is_opaque(weight):
            grad_x = opaque_convolution(
                grad, weight, None, stride, padding, dilation, groups, grad.dtype
            )
        else:
            weight = cast_weight_backward(weight, grad)
            grad_x = _PLAIN[len(stride)](grad, weight, None, stride, padding, dilation, groups)
        return grad_x.to(ctx.dtype).contiguous(memory_format=ctx.layout), *[None] * 7


def _conv_transpose(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    if is_opaque(weight):
        stride, padding, more, groups, dilation = geometry
        return opaque_convolution(
            x, weight, bias, stride, padding, dilation, groups, lowered(x, x.dtype), more
        )
    conv = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
    result: Tensor = conv[weight.dim() - 2](x, cast_weight(weight, x), bias, *geometry)
    return result


def frozen_conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    output_padding: tuple[int, ...],
    groups: int,
    dilation: tuple[int, ...],
) -> Tensor:
    """Transposed convolution whose weight gets no gradient; keeps nothing for the backward.

    Args:
        x: (N, C, *in).
        weight: (C, O/groups, *kernel).
        bias: (O,) or None.
        stride: The distance of windows in the output, one number an axis.
        padding: The padding of the convolution that this one transposes.
        output_padding: Added to one side of the output.
        groups: The number of groups of channels.
        dilation: The kernel's dilation, one number an axis.

    Returns:
        (N, O, *out).
    """
    geometry = (stride, padding, output_padding, groups, dilation)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return _conv_transpose(x, weight, bias, *geometry)
    result: Tensor = _FrozenConvTranspose.apply(x, weight, bias, *geometry)
    return result


def pad_mode(x: Tensor, padding: Sequence[int], mode: str) -> Tensor:
    """`torch.nn.functional.pad` with ``"reflect"``, ``"replicate"`` or ``"circular"``.

    Keeps nothing: padding is linear, so its backward needs the shape of `x` only.

    Args:
        x: (N, C, *in).
        padding: As `torch.nn.functional.pad` takes it: last axis first, two numbers an axis.
        mode: The padding's mode.

    Returns:
        (N, C, *in + padding).
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return F.pad(x, padding, mode)
    result: Tensor = _Pad.apply(x, tuple(padding), mode)
    return result


class _Pad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, padding: tuple[int, ...], mode: str) -> Tensor:
        ctx.size, ctx.padding, ctx.mode, ctx.layout = x.size(), padding, mode, layout_of(x)
        return F.pad(x, padding, mode)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():  # the transpose of a linear map, taken at any point
            point = torch.empty(ctx.size, dtype=grad.dtype, device=grad.device, requires_grad=True)
            (grad_x,) = torch.autograd.grad(F.pad(point, ctx.padding, ctx.mode), point, grad)
        return grad_x.contiguous(memory_format=ctx.layout), None, None
