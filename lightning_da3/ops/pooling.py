"""Pools that keep the position of a maximum in half a byte or one, or nothing but a shape.

Shapes: x (N, C, *in) or (C, *in), y (N, C, *out), one to three spatial axes. Kept: max pool four
bits an output, eight for windows of more than 16 positions: the offset of the maximum inside its
window (plain PyTorch: the whole input and an int64 index); average pools nothing (plain PyTorch:
the whole input).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_da3.ops.backward import once_differentiable
from lightning_da3.ops.bits import pack_pairs, unpack_pairs
from lightning_da3.ops.exportable import is_exportable
from lightning_da3.torch_private.decompositions import adaptive_pool
from lightning_da3.torch_private.kernels import (
    ADAPTIVE_AVG_POOL_BACKWARD,
    AVG_POOL_BACKWARD,
    MAX_POOL_BACKWARD,
)

_aten = torch.ops.aten
MAX_WINDOW = 256  # positions that one byte can tell apart


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        kernel: tuple[int, ...],
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        ceil_mode: bool,
    ) -> Tensor:
        y, index = _max_pool(len(kernel))(
            x, list(kernel), list(stride), list(padding), list(dilation), ceil_mode
        )
        ctx.geometry = (kernel, stride, padding, dilation, ceil_mode)
        ctx.size = x.size()
        offset = _to_offset(index, x.size(), *ctx.geometry[:4])
        ctx.out, ctx.out_stride = offset.size(), offset.stride()
        ctx.save_for_backward(pack_pairs(offset) if _fits_half(kernel) else offset)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (offset,) = ctx.saved_tensors
        kernel, stride, padding, dilation, ceil_mode = ctx.geometry
        if _fits_half(kernel):
            offset = unpack_pairs(offset, ctx.out, ctx.out_stride)
        index = _to_index(offset, ctx.size, kernel, stride, padding, dilation)
        grad_x = MAX_POOL_BACKWARD[len(kernel)](
            grad, _shape_only(grad, ctx.size), *map(list, ctx.geometry[:4]), ceil_mode, index
        )
        return grad_x, None, None, None, None, None


def _fits_half(kernel: Sequence[int]) -> bool:
    return math.prod(kernel) <= 16


def _max_pool(axes: int) -> Callable[..., tuple[Tensor, Tensor]]:
    return {2: _aten.max_pool2d_with_indices, 3: _aten.max_pool3d_with_indices}[axes]


def _shape_only(like: Tensor, size: Sequence[int]) -> Tensor:
    """A stand-in of one element for a tensor of shape `size` whose values nobody reads."""
    return like.new_empty(1).expand(size)


def _window_starts(
    out: Sequence[int], stride: Sequence[int], padding: Sequence[int], device: torch.device
) -> list[Tensor]:
    """Per axis, where each output's window starts, shaped to broadcast over (.., *out)."""
    axes = len(stride)
    return [
        (torch.arange(n, device=device) * s - p).view(-1, *[1] * (axes - 1 - axis))
        for axis, (n, s, p) in enumerate(zip(out, stride, padding, strict=True))
    ]


def _to_offset(
    index: Tensor,
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    axes = len(kernel)
    starts = _window_starts(index.shape[-axes:], stride, padding, index.device)
    code: Tensor = torch.zeros((), dtype=torch.int64, device=index.device)
    weight = 1
    for axis in reversed(range(axes)):  # last axis fastest, in the input as in the window
        extent = size[axis - axes]
        position = index % extent
        index = index // extent
        code = code + (position - starts[axis]) // dilation[axis] * weight
        weight *= kernel[axis]
    return code.to(torch.uint8)


def _to_index(
    offset: Tensor,
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    axes = len(kernel)
    starts = _window_starts(offset.shape[-axes:], stride, padding, offset.device)
    code = offset.to(torch.int64)
    index: Tensor = torch.zeros((), dtype=torch.int64, device=offset.device)
    weight = 1
    for axis in reversed(range(axes)):
        position = code % kernel[axis] * dilation[axis] + starts[axis]
        code = code // kernel[axis]
        index = index + position * weight
        weight *= size[axis - axes]
    return index


def _needs_graph(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def max_pool(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool = False,
) -> Tensor:
    """Max pooling over one to three axes; keeps at most one byte an output.

    Args:
        x: (N, C, *in) or (C, *in).
        kernel: The window's size, one number an axis; at most 256 positions in all.
        stride: The distance of windows, one number an axis.
        padding: The padding on both sides, one number an axis.
        dilation: The distance of positions in a window, one number an axis.
        ceil_mode: Round the output size up.

    Returns:
        (N, C, *out) or (C, *out).
    """
    axes = len(kernel)
    if not _needs_graph(x) or math.prod(kernel) > MAX_WINDOW:
        plain = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[axes]
        pooled: Tensor = plain(
            x, tuple(kernel), tuple(stride), tuple(padding), tuple(dilation), ceil_mode
        )
        return pooled
    if axes == 1:  # one axis is two with a first of size 1
        rows = max_pool(
            x.unsqueeze(-2), (1, *kernel), (1, *stride), (0, *padding), (1, *dilation), ceil_mode
        )
        return rows.squeeze(-2)
    result: Tensor = _MaxPool.apply(
        x, tuple(kernel), tuple(stride), tuple(padding), tuple(dilation), ceil_mode
    )
    return result


class _ShapeOnly(torch.autograd.Function):
    """A pool whose backward kernel reads the shape of its input but none of its values."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, forward: Callable[..., Tensor], backward: Any, args: tuple[Any, ...]
    ) -> Tensor:
        ctx.size, ctx.transpose, ctx.args = x.size(), backward, args
        return forward(x, *args)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.transpose(grad, _shape_only(grad, ctx.size), *ctx.args), None, None, None


def avg_pool(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Average pooling over one to three axes; keeps nothing.

    Args:
        x: (N, C, *in) or (C, *in).
        kernel: The window's size, one number an axis.
        stride: The distance of windows, one number an axis.
        padding: Zeros on both sides, one number an axis.
        ceil_mode: Round the output size up.
        count_include_pad: Count the padding's zeros.
        divisor_override: Divide by this instead (two and three axes).

    Returns:
        (N, C, *out) or (C, *out).
    """
    if len(kernel) == 1:
        rows = avg_pool(
            x.unsqueeze(-2), (1, *kernel), (1, *stride), (0, *padding), ceil_mode, count_include_pad
        )
        return rows.squeeze(-2)
    forward = {2: _aten.avg_pool2d, 3: _aten.avg_pool3d}[len(kernel)]
    args = (
        list(kernel),
        list(stride),
        list(padding),
        ceil_mode,
        count_include_pad,
        divisor_override,
    )
    if not _needs_graph(x):
        return forward(x, *args)  # type: ignore[no-any-return]
    result: Tensor = _ShapeOnly.apply(x, forward, AVG_POOL_BACKWARD[len(kernel)], args)
    return result


class _Mean(torch.autograd.Function):
    """The mean over the last axes; its gradient, one number a channel, is not written out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axes: int) -> Tensor:
        ctx.size, ctx.pixels = x.size(), x.shape[-axes:].numel()
        return x.mean(dim=tuple(range(-axes, 0)), keepdim=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return (grad / ctx.pixels).expand(ctx.size), None


def adaptive_avg_pool(x: Tensor, grid: Sequence[int | None]) -> Tensor:
    """Adaptive average pooling over one to three axes; keeps nothing.

    Args:
        x: (N, C, *in) or (C, *in).
        grid: Output size, one number an axis; None keeps that axis.

    Returns:
        (N, C, *grid) or (C, *grid).
    """
    axes = len(grid)
    sizes = [x.shape[i - axes] if n is None else n for i, n in enumerate(grid)]
    if math.prod(sizes) == 1:
        if not _needs_graph(x):
            return x.mean(dim=tuple(range(-axes, 0)), keepdim=True)
        mean: Tensor = _Mean.apply(x, axes)
        return mean
    if axes == 1:
        return adaptive_avg_pool(x.unsqueeze(-2), (1, *sizes)).squeeze(-2)
    forward = {2: _aten.adaptive_avg_pool2d, 3: _aten.adaptive_avg_pool3d}[axes]
    if not _needs_graph(x):
        if is_exportable() and any(n % m for n, m in zip(x.shape[-axes:], sizes, strict=True)):
            return adaptive_pool(x, sizes)  # else one slice is added after the other
        return forward(x, sizes)  # type: ignore[no-any-return]
    # the backward kernel knows the grid from the gradient
    backward = ADAPTIVE_AVG_POOL_BACKWARD[axes]
    result: Tensor = _ShapeOnly.apply(x, lambda t: forward(t, sizes), backward, ())
    return result
