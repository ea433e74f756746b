"""Pools that keep positions or nothing; arguments as in `lightning_da3.ops.pooling`."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_da3.ops.pooling import adaptive_avg_pool, avg_pool, max_pool


class MaxPool(nn.Module):
    """Max pool that keeps at most a byte an output; see `lightning_da3.ops.pooling.max_pool`."""

    def __init__(
        self,
        kernel: tuple[int, ...],
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        ceil_mode: bool,
    ) -> None:
        super().__init__()
        self.kernel, self.stride, self.padding = kernel, stride, padding
        self.dilation, self.ceil_mode = dilation, ceil_mode

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *in) to (N, C, *out)."""
        return max_pool(x, self.kernel, self.stride, self.padding, self.dilation, self.ceil_mode)


class AvgPool(nn.Module):
    """Average pool that keeps nothing; see `lightning_da3.ops.pooling.avg_pool`."""

    def __init__(
        self,
        kernel: tuple[int, ...],
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        ceil_mode: bool,
        count_include_pad: bool,
        divisor_override: int | None,
    ) -> None:
        super().__init__()
        self.kernel, self.stride, self.padding = kernel, stride, padding
        self.ceil_mode, self.count_include_pad = ceil_mode, count_include_pad
        self.divisor_override = divisor_override

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *in) to (N, C, *out)."""
        return avg_pool(
            x,
            self.kernel,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )


class AdaptiveAvgPool(nn.Module):
    """Adaptive average pool that keeps nothing.

    Args:
        grid: Output size, one number an axis; None keeps that axis.
    """

    def __init__(self, grid: tuple[int | None, ...]) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *in) to (N, C, *grid)."""
        return adaptive_avg_pool(x, self.grid)
