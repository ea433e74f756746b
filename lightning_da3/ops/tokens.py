"""`lightning_da3.ops.host` for tokens: channels last, class tokens apart.

Shapes: x (N, *in, C) enters the host, f (N, *in, O) leaves it. With one axis of T tokens the first
`own` of them (class and register tokens) are cells by themselves; the others lie on a grid of G
cells. Cells stand in one row: p (N, C, own + G), gate (N, 1, own + G), addend (N, O, own + G).
Where every token is a cell, p is a view of x.
Kept: by `read_tokens` nothing; by `write_tokens` the gate and, if it trains, the cell means of f.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_da3.ops.backward import once_differentiable
from lightning_da3.ops.bits import reshaped
from lightning_da3.ops.exportable import is_exportable
from lightning_da3.ops.host import (
    Means,
    add_pool_gradient_,
    cell_sums,
    coarse_grid,
    divides,
    gated,
    pool,
    upsample,
    writable,
    write_,
)


class TokenGrid(NamedTuple):
    """Which cell a token lies in.

    Attributes:
        own: Leading tokens that are cells by themselves.
        size: The axes along which the others lie.
        grid: Cells along every axis of `size`.
    """

    own: int
    size: tuple[int, ...]
    grid: tuple[int, ...]

    @classmethod
    def of(cls, size: Sequence[int], own: int, max_cells: int) -> TokenGrid:
        """The grid of tokens with these axes between N and C; n * n in a row are a square."""
        size = tuple(size)
        if len(size) > 1:
            return cls(0, size, coarse_grid(size, max_cells))
        rest = size[0] - own
        side = math.isqrt(max(rest, 0))
        size = (side, side) if side > 1 and side * side == rest else (rest,)
        return cls(own, size, coarse_grid(size, max_cells))

    @property
    def whole(self) -> bool:
        """Whether every token is a cell by itself."""
        return self.grid == self.size

    def maps(self, x: Tensor) -> Tensor:
        """View of (N, *in, C) without its own tokens as (N, C, *size)."""
        if x.dim() != 3:
            return x.movedim(-1, 1)
        rest = x[:, self.own :].transpose(1, 2)
        return rest.unflatten(2, list(self.size)) if len(self.size) > 1 else rest  # type: ignore[no-untyped-call]

    def prefix_tokens(self, x: Tensor) -> Tensor:
        """View of the own tokens of (N, T, C) as (N, C, own)."""
        return x[:, : self.own].transpose(1, 2)

    def on_grid(self, cells: Tensor) -> Tensor:
        """View of the others' cells of (N, C, own + G) as (N, C, *grid)."""
        rest = cells[:, :, self.own :]
        return rest.unflatten(2, list(self.grid)) if len(self.grid) > 1 else rest  # type: ignore[no-untyped-call]

    def on_tokens(self, cells: Tensor, size: torch.Size) -> Tensor:
        """Every token's cell of (N, C, own + G), in new memory of this size: (N, *in, C)."""
        rows = upsample(self.on_grid(cells), self.size).flatten(2).transpose(1, 2)
        if self.own:
            rows = torch.cat([cells[:, :, : self.own].transpose(1, 2), rows], dim=1)
        return rows if rows.dim() == len(size) else rows.reshape(size)

    def in_row(self, x: Tensor, coarse: Tensor) -> Tensor:
        """The own tokens of `x` and `coarse` (N, C, *grid) as (N, C, own + G)."""
        rows = coarse.flatten(2).transpose(1, 2)
        rows = torch.cat([x[:, : self.own], rows], dim=1) if self.own else rows.contiguous()
        return rows.transpose(1, 2)  # channels last in memory, as tokens are


class _ReadTokens(torch.autograd.Function):
    """``x -> (x, cells(x))``; the backward adds the cells' gradient into that of x, in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, place: TokenGrid, apart: bool) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.size, ctx.place = x.size(), place
        return x.view_as(x), _cells(x, place, apart)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, grad_cells: Tensor | None
    ) -> tuple[Tensor | None, None, None]:
        if grad_cells is None:
            return grad, None, None
        place = ctx.place
        if is_exportable() and divides(place.size, place.grid):
            pixels = math.prod(place.size) // math.prod(place.grid)
            own, rest = grad_cells[:, :, : place.own], grad_cells[:, :, place.own :] / pixels
            whole = place.on_tokens(torch.cat([own, rest], dim=2), ctx.size)
            return whole if grad is None else grad + whole, None, None
        grad = writable(grad, ctx.size, grad_cells)
        if place.whole:
            return grad.add_(reshaped(grad_cells.transpose(1, 2), *ctx.size)), None, None
        add_pool_gradient_(place.maps(grad), place.on_grid(grad_cells))
        if place.own:
            place.prefix_tokens(grad).add_(grad_cells[:, :, : place.own])
        return grad, None, None


def _cells(x: Tensor, place: TokenGrid, apart: bool) -> Tensor:
    """The cell means; if every token is a cell, a view of `x` unless that must stay `apart`."""
    if place.whole and not apart and not torch.compiler.is_compiling():
        return x.flatten(1, -2).transpose(1, 2)
    return place.in_row(x, pool(place.maps(x), place.grid))


def read_tokens(x: Tensor, place: TokenGrid, apart: bool = False) -> tuple[Tensor, Tensor]:
    """The host's input and its cell means; see `lightning_da3.ops.host.read`.

    Args:
        x: (N, *in, C).
        place: The cells of its tokens.
        apart: p has memory of its own: it may be kept while x is overwritten.

    Returns:
        x (N, *in, C) and p (N, C, own + G), which may be a view of x.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x, _cells(x, place, apart)
    result: tuple[Tensor, Tensor] = _ReadTokens.apply(x, place, apart)
    return result


class _WriteTokens(torch.autograd.Function):
    """``f -> up(gate) * f + up(addend)``."""

    @staticmethod
    def forward(
        ctx: Any, f: Tensor, addend: Tensor, gate: Tensor | None, place: TokenGrid, exact: bool
    ) -> Tensor:
        ctx.place, ctx.gated, ctx.read = place, gate is not None, None
        saved: tuple[Tensor, ...] = ()
        if gate is not None:
            saved = (gate,)
            if ctx.needs_input_grad[2]:
                cells = _cells(f, place, apart=exact)
                means = Means.of(cells.contiguous() if exact else cells, exact)
                ctx.read = means.read
                saved = (gate, means.kept)
        ctx.save_for_backward(*saved)
        return _written(f, addend, gate, place)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        place = ctx.place
        sums = place.in_row(grad, cell_sums(place.maps(grad), place.grid))
        if not ctx.gated:
            return grad, sums, None, None, None
        gate, *kept = ctx.saved_tensors
        grad_f = grad_gate = None
        if ctx.read is not None:
            means = ctx.read(kept[0]).to(grad.dtype)
            grad_gate = (sums * means).sum(dim=1, keepdim=True)
        if ctx.needs_input_grad[0]:
            grad_f = torch.empty_like(grad)
            place.maps(grad_f).copy_(gated(place.maps(grad), place.on_grid(gate)))
            if place.own:
                own = place.prefix_tokens(grad) * gate[:, :, : place.own]
                place.prefix_tokens(grad_f).copy_(own)
        return grad_f, sums, grad_gate, None, None


def _written(f: Tensor, addend: Tensor, gate: Tensor | None, place: TokenGrid) -> Tensor:
    if is_exportable():  # runtimes write into parts of a tensor one number after the other
        y = f if gate is None else f * place.on_tokens(gate, torch.Size([*f.shape[:-1], 1]))
        return y + place.on_tokens(addend, f.shape)
    y = f.clone()
    open_ = None if gate is None else place.on_grid(gate)
    write_(place.maps(y), place.on_grid(addend), open_)
    if place.own:
        own = place.prefix_tokens(y)
        if gate is not None:
            own.mul_(gate[:, :, : place.own])
        own.add_(addend[:, :, : place.own])
    return y


def write_tokens(
    f: Tensor, addend: Tensor, gate: Tensor | None, place: TokenGrid, exact: bool = False
) -> Tensor:
    """``y = up(gate) * f + up(addend)``; see `lightning_da3.ops.host.write`.

    Args:
        f: (N, *in, O).
        addend: (N, O, own + G).
        gate: (N, 1, own + G) of zeros and ones, or None for an open gate.
        place: The cells of its tokens.
        exact: Keep the cell means as they are, not as 8-bit codes.

    Returns:
        y, (N, *in, O).
    """
    needs_graph = f.requires_grad or addend.requires_grad
    needs_graph = needs_graph or (gate is not None and gate.requires_grad)
    if not (torch.is_grad_enabled() and needs_graph):
        return _written(f, addend, gate, place)
    result: Tensor = _WriteTokens.apply(f, addend, gate, place, exact)
    return result
