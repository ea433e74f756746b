"""Sampling a map at given points, which is linear in the map.

Shapes: x (N, C, H, W), grid (N, H', W', 2) of points in [-1, 1], y (N, C, H', W'); or one axis more
of each. Kept: the points, and nothing of x, which plain PyTorch keeps as well.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_da3.ops.backward import once_differentiable
from lightning_da3.torch_private.kernels import GRID_SAMPLE_BACKWARD

_BILINEAR, _PADDING = 0, {"zeros": 0, "border": 1}


class _Sample(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Tensor, padding: str, align_corners: bool) -> Tensor:
        ctx.how = (_BILINEAR, _PADDING[padding], align_corners)
        ctx.size = x.size()
        ctx.save_for_backward(grid)
        return F.grid_sample(x, grid, "bilinear", padding, align_corners)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (grid,) = ctx.saved_tensors
        shape_only = grad.new_empty(1).expand(ctx.size)
        backward = GRID_SAMPLE_BACKWARD[grad.dim() - 2]
        grad_x, _ = backward(grad, shape_only, grid, *ctx.how, [True, False])
        return grad_x, None, None, None


def grid_sample(
    x: Tensor,
    grid: Tensor,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool | None = None,
) -> Tensor:
    """`torch.nn.functional.grid_sample` at points that need no gradient.

    Args:
        x: (N, C, H, W) or (N, C, D, H, W).
        grid: (N, H', W', 2) or (N, D', H', W', 3).
        mode: As in PyTorch; only bilinear sampling keeps less.
        padding_mode: As in PyTorch; reflection keeps what PyTorch keeps.
        align_corners: As in PyTorch.

    Returns:
        (N, C, H', W') or (N, C, D', H', W').
    """
    known = mode == "bilinear" and padding_mode in _PADDING and not grid.requires_grad
    if not (torch.is_grad_enabled() and x.requires_grad and known):
        return F.grid_sample(x, grid, mode, padding_mode, align_corners)
    result: Tensor = _Sample.apply(x, grid, padding_mode, bool(align_corners))
    return result
