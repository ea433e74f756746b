"""Sampling a map at given points, which is linear in the map.

Shapes: x (N, C, H, W), grid (N, H', W', 2) of points in [-1, 1], y (N, C, H', W'); or one axis more
of each. Kept: the points, in 16 bits (off by at most 1/131070 of the range of 256 neighbours), or
themselves if exact; of x nothing. Plain PyTorch keeps x, too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_da3.ops.bits import dense
from lightning_da3.ops.codes import decode_16, encode_16

_aten = torch.ops.aten
_BILINEAR, _PADDING = 0, {"zeros": 0, "border": 1}
# from there on out it is all padding, or the border: as far as a map of two pixels reaches
_FAR = 3.0


class _Sample(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, grid: Tensor, padding: str, align_corners: bool, exact: bool
    ) -> Tensor:
        ctx.how = (_BILINEAR, _PADDING[padding], align_corners)
        ctx.size, ctx.exact = x.size(), exact
        points = dense(grid)
        ctx.grid = (points.size(), points.stride(), points.dtype)
        ctx.save_for_backward(points if exact else encode_16(points.clamp(-_FAR, _FAR)))
        return F.grid_sample(x, grid, "bilinear", padding, align_corners)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (points,) = ctx.saved_tensors
        if not ctx.exact:
            points = decode_16(points, *ctx.grid)
        shape_only = grad.new_empty(1).expand(ctx.size)
        transpose = {4: _aten.grid_sampler_2d_backward, 5: _aten.grid_sampler_3d_backward}
        grad_x, _ = transpose[grad.dim()](grad, shape_only, points, *ctx.how, [True, False])
        return grad_x, None, None, None, None


def grid_sample(
    x: Tensor,
    grid: Tensor,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool | None = None,
    *,
    exact: bool = False,
) -> Tensor:
    """`torch.nn.functional.grid_sample` at points that need no gradient.

    Args:
        x: (N, C, H, W) or (N, C, D, H, W).
        grid: (N, H', W', 2) or (N, D', H', W', 3).
        mode: As PyTorch's; only bilinear sampling keeps less.
        padding_mode: As PyTorch's; reflection keeps what it keeps there.
        align_corners: As PyTorch's.
        exact: Keep the points as they are.

    Returns:
        (N, C, H', W') or (N, C, D', H', W').
    """
    known = mode == "bilinear" and padding_mode in _PADDING and not grid.requires_grad
    if not (torch.is_grad_enabled() and x.requires_grad and known):
        return F.grid_sample(x, grid, mode, padding_mode, align_corners)
    result: Tensor = _Sample.apply(x, grid, padding_mode, bool(align_corners), exact)
    return result
