"""What a host's adapter does at full resolution: read the input coarsely, write the output.

Shapes: x (N, C, *in) enters the host, f (N, O, *out) leaves it, everything else lives on a coarse
grid of G cells: p (N, C, *grid), gate (N, 1, *grid), addend (N, O, *grid).
Kept: by `read` nothing; by `write` the gate and, if it trains, the cell means of f (8-bit codes
unless exact), or what these follow from. No tensor of full resolution is kept, and f is
overwritten.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_da3.ops.backward import once_differentiable
from lightning_da3.ops.bits import is_recorded, layout_of
from lightning_da3.ops.codes import Rows
from lightning_da3.ops.exportable import is_exportable
from lightning_da3.torch_private.decompositions import adaptive_pool
from lightning_da3.torch_private.kernels import (
    ADAPTIVE_AVG_POOL_BACKWARD,
    UPSAMPLE_NEAREST_BACKWARD,
)


def coarse_grid(size: Sequence[int], max_cells: int) -> tuple[int, ...]:
    """The grid of a map: every axis divided by the least factor that leaves `max_cells` cells.

    Args:
        size: The map's size, one number an axis.
        max_cells: Most cells of the whole grid.

    Returns:
        Cells along every axis; between 1 and the axis's size.
    """
    limit = max(1, math.floor(max_cells ** (1 / len(size)) + 1e-9))
    return tuple([math.ceil(n / math.ceil(n / limit)) if n else 1 for n in size])


def divides(size: Sequence[int], grid: Sequence[int]) -> bool:
    """Whether all cells have one size."""
    remainders = [n % cells for n, cells in zip(size, grid, strict=True)]  # torch.compile: a list
    return not any(remainders)


def _broadcasts(size: Sequence[int], grid: Sequence[int]) -> bool:
    """Whether a view by `split` takes cells; runtimes of files are slow at short last axes."""
    return divides(size, grid) and not is_exportable()


def split(x: Tensor, grid: Sequence[int]) -> Tensor:
    """View of (N, C, *in) as (N, C, G1, r1, G2, r2, ..); needs cells of one size."""
    cells = [n for size, g in zip(x.shape[2:], grid, strict=True) for n in (g, size // g)]
    return x.view(*x.shape[:2], *cells)


def spread(coarse: Tensor) -> Tensor:
    """View of (N, C, *grid) as (N, C, G1, 1, G2, 1, ..), to broadcast over `split`."""
    return coarse.view(*coarse.shape[:2], *[n for g in coarse.shape[2:] for n in (g, 1)])


def upsample(coarse: Tensor, size: Sequence[int]) -> Tensor:
    """Nearest neighbour: (N, C, *grid) to (N, C, *size); pixel i lies in cell i * grid // size."""
    grid = coarse.shape[2:]
    if tuple(size) == tuple(grid):
        return coarse
    if is_exportable() and divides(size, grid):  # runtimes do more with a constant factor
        factors = [float(n // cells) for n, cells in zip(size, grid, strict=True)]
        return F.interpolate(coarse, scale_factor=factors, mode="nearest")
    return F.interpolate(coarse, size=tuple(size), mode="nearest")


def pool(x: Tensor, grid: Sequence[int]) -> Tensor:
    """Cell means of the coarse grid, (N, C, *grid)."""
    axes = len(grid)
    size = x.shape[2:]
    if tuple(size) == tuple(grid):
        return x.clone()  # whoever asked for means may keep them while x is overwritten
    if axes == 2 and divides(size, grid):
        return F.avg_pool2d(x, [n // cells for n, cells in zip(size, grid, strict=True)])
    if is_exportable():  # else one slice is added after the other
        return adaptive_pool(x, grid)
    adaptive: Callable[..., Tensor] = {
        1: F.adaptive_avg_pool1d,
        2: F.adaptive_avg_pool2d,
        3: F.adaptive_avg_pool3d,
    }[axes]
    return adaptive(x, tuple(grid))


def cell_sums(x: Tensor, grid: Sequence[int]) -> Tensor:
    """Sums over the pixels of every cell, the transpose of `upsample`, (N, C, *grid).

    The result is `x` itself if cells are single pixels.
    """
    size = x.shape[2:]
    if tuple(size) == tuple(grid):
        return x
    if divides(size, grid):
        cell = [n // c for n, c in zip(size, grid, strict=True)]
        if len(cell) == 2:
            return F.avg_pool2d(x, cell, divisor_override=1)
        return pool(x, grid) * math.prod(cell)
    transpose = UPSAMPLE_NEAREST_BACKWARD[len(grid)]
    return transpose(x, list(size), [*x.shape[:2], *grid])


class _Read(torch.autograd.Function):
    """``x -> (x, pool(x))``; the backward adds the pool's gradient into that of x, in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.size, ctx.layout = x.size(), layout_of(x)
        return x.view_as(x), pool(x, grid)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, grad_pooled: Tensor | None
    ) -> tuple[Tensor | None, None]:
        if grad is not None:
            grad = grad.contiguous(memory_format=ctx.layout)
        if grad_pooled is None:
            return grad, None
        grad = writable(grad, ctx.size, grad_pooled)
        add_pool_gradient_(grad, grad_pooled)
        return grad, None


def writable(grad: Tensor | None, size: torch.Size, like: Tensor) -> Tensor:
    """`grad` if its elements have memory of their own, else a copy; zeros for None."""
    if grad is None:
        return like.new_zeros(size)
    expanded = any(s == 0 and n > 1 for s, n in zip(grad.stride(), grad.shape, strict=True))
    return grad.contiguous() if expanded else grad


def add_pool_gradient_(grad: Tensor, grad_pooled: Tensor) -> None:
    """Add to dL/dx (N, C, *in) what comes from dL/dp (N, C, *grid)."""
    size, grid = grad.shape[2:], grad_pooled.shape[2:]
    if divides(size, grid):
        pixels = math.prod([n // c for n, c in zip(size, grid, strict=True)])
        if is_exportable():
            grad.add_(upsample(grad_pooled / pixels, size))
        else:
            split(grad, grid).add_(spread(grad_pooled), alpha=1.0 / pixels)
    else:
        grad.add_(pool_transpose(grad_pooled, grad.shape))


def pool_transpose(grad: Tensor, size: Sequence[int]) -> Tensor:
    """The transpose of `pool`, for cells of any size: (N, C, *grid) to `size`."""
    shape_only = grad.new_empty(1).expand(size)
    if grad.dim() == 3:  # one axis is two with a first of size 1
        rows = ADAPTIVE_AVG_POOL_BACKWARD[2](grad.unsqueeze(2), shape_only.unsqueeze(2))
        return rows.squeeze(2)
    return ADAPTIVE_AVG_POOL_BACKWARD[grad.dim() - 2](grad, shape_only)


def read(x: Tensor, grid: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The host's input and its cell means.

    The first result must go to the host alone, and the host's first operation must return a
    gradient that nothing else holds (a frozen convolution does): it is added to in place.

    Args:
        x: (N, C, *in).
        grid: Cells along every axis.

    Returns:
        x (N, C, *in) and p (N, C, *grid).
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x, pool(x, grid)
    result: tuple[Tensor, Tensor] = _Read.apply(x, grid)
    return result


class Means(NamedTuple):
    """What the cell means of f are made from in the backward.

    Attributes:
        kept: The saved tensor; never written to.
        read: Makes the means (N, O, *grid) from `kept`; must not hold `kept` itself.
    """

    kept: Tensor
    read: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, means: Tensor, exact: bool) -> Means:
        """The means themselves, or their 8-bit codes."""
        if exact:
            return cls(means, _itself)
        rows = Rows.of(means)
        return cls(rows.encode(means), rows.decode)


def _itself(means: Tensor) -> Tensor:
    return means


class _Write(torch.autograd.Function):
    """``f -> up(gate) * f + up(addend)``, in place."""

    @staticmethod
    def forward(
        ctx: Any,
        f: Tensor,
        addend: Tensor,
        gate: Tensor | None,
        exact: bool,
        means: Means | None,
    ) -> Tensor:
        grid = addend.shape[2:]
        ctx.grid, ctx.gated, ctx.read = tuple(grid), gate is not None, None
        saved: tuple[Tensor, ...] = ()
        if gate is not None:
            saved = (gate,)
            if ctx.needs_input_grad[2]:
                means = Means.of(pool(f, grid), exact) if means is None else means
                ctx.read = means.read
                saved = (gate, means.kept)
        ctx.save_for_backward(*saved)
        ctx.mark_dirty(f)
        write_(f, addend, gate)
        return f

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        sums = cell_sums(grad, ctx.grid)  # (N, O, *grid)
        if not ctx.gated:
            return grad, sums, None, None, None
        gate, *kept = ctx.saved_tensors
        grad_f = grad_gate = None
        if ctx.read is not None:
            means = ctx.read(kept[0]).to(grad.dtype)
            grad_gate = (sums * means).sum(dim=1, keepdim=True)
        if ctx.needs_input_grad[0]:
            grad_f = gated(grad, gate)
        return grad_f, sums, grad_gate, None, None


def gated(x: Tensor, gate: Tensor) -> Tensor:
    """``up(gate) * x``, with the strides of x."""
    size, grid = x.shape[2:], gate.shape[2:]
    if not _broadcasts(size, grid):
        return x * upsample(gate, size)
    return (split(x, grid) * spread(gate)).view(x.shape)  # the product has the strides of x


def write_(f: Tensor, addend: Tensor, gate: Tensor | None) -> Tensor:
    """``up(gate) * f + up(addend)``, in the memory of f."""
    size, grid = f.shape[2:], addend.shape[2:]
    if _broadcasts(size, grid):
        cells, addend = split(f, grid), spread(addend)
        gate = None if gate is None else spread(gate)
    else:
        cells, addend = f, upsample(addend, size)
        gate = None if gate is None else upsample(gate, size)
    if gate is None:
        cells.add_(addend)
    elif is_recorded():  # compilers fuse them; `out` may have no gaps, and builds no graph
        cells.mul_(gate).add_(addend)
    else:
        torch.addcmul(addend, cells, gate, out=cells)
    return f


def write(
    f: Tensor,
    addend: Tensor,
    gate: Tensor | None,
    exact: bool = False,
    means: Means | None = None,
) -> Tensor:
    """``y = up(gate) * f + up(addend)``, written into `f`.

    The exact gradient of the gate, the sum over a cell of dL/dy * f, would need f. Kept instead is
    the mean of f over every cell: dL/dgate is estimated as the sum over channels of
    (sum over the cell of dL/dy) * (mean over the cell of f), exact where cells are single pixels.

    Args:
        f: (N, O, *out), not read by anything else; overwritten.
        addend: (N, O, *grid).
        gate: (N, 1, *grid) of zeros and ones, or None for an open gate.
        exact: Keep the cell means as they are, not as 8-bit codes.
        means: What the cell means follow from, if that is kept anyway.

    Returns:
        y, (N, O, *out), in the memory of `f`.
    """
    needs_graph = f.requires_grad or addend.requires_grad
    needs_graph = needs_graph or (gate is not None and gate.requires_grad)
    if not (torch.is_grad_enabled() and needs_graph):
        return write_(f, addend, gate)
    result: Tensor = _Write.apply(f, addend, gate, exact, means)
    return result
