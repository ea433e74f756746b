"""A frozen piece of a network that keeps its input, in 8 bits, and is computed again in the backward.

Shapes: any. Kept: the codes of one activation (1/4 of float32; see `lightning_da3.ops.codes`), or
that activation itself if exact; constants that the piece reads as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_da3.ops.bits import dense
from lightning_da3.ops.codes import decode, encode

Piece = Callable[..., tuple[Any, ...]]


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, piece: Piece, exact: bool, trained: int, x: Tensor, *rest: Any
    ) -> tuple[Any, ...]:
        ctx.piece, ctx.exact, ctx.trained = piece, exact, trained
        ctx.set_materialize_grads(False)
        ctx.autocast = _autocast_of(x.device.type)
        tensors = [r for r in rest if isinstance(r, Tensor)]
        ctx.rest = [None if isinstance(r, Tensor) else r for r in rest]
        if exact:
            ctx.save_for_backward(x, *tensors)
        else:
            x_dense = dense(x.detach())
            ctx.size, ctx.stride, ctx.dtype = x.size(), x_dense.stride(), x.dtype
            ctx.save_for_backward(*encode(x_dense), *tensors)
        outputs = piece(x.view_as(x), *rest[trained:])
        ctx.mark_non_differentiable(
            *[y for y in outputs if isinstance(y, Tensor) and not y.is_floating_point()]
        )
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.exact:
            x, *tensors = ctx.saved_tensors
        else:
            codes, low, step, *tensors = ctx.saved_tensors
            x = decode(codes, low, step, ctx.size, ctx.stride, ctx.dtype)
        waiting = iter(tensors)
        rest = [r if r is not None else next(waiting, None) for r in ctx.rest]
        x = x.detach().requires_grad_(ctx.needs_input_grad[3])
        with torch.enable_grad(), ctx.autocast():
            outputs = ctx.piece(x, *rest[ctx.trained :])
        wanted = [(y, g) for y, g in zip(outputs, grads, strict=True) if g is not None]
        wanted = [(y, g) for y, g in wanted if y.requires_grad]
        parameters = rest[: ctx.trained]
        sources = [t for t in (x, *parameters) if t.requires_grad]
        found = iter(
            torch.autograd.grad(
                [y for y, _ in wanted], sources, [g for _, g in wanted], allow_unused=True
            )
            if wanted and sources
            else [None] * len(sources)
        )
        back = [next(found) if t.requires_grad else None for t in (x, *parameters)]
        return None, None, None, *back, *[None] * (len(rest) - ctx.trained)


def _autocast_of(device: str) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    if not torch.is_autocast_enabled(device):
        return contextlib.nullcontext
    dtype = torch.get_autocast_dtype(device)
    return lambda: torch.autocast(device, dtype=dtype)


def recomputed(
    piece: Piece, x: Tensor, *rest: Any, exact: bool = False, parameters: tuple[Tensor, ...] = ()
) -> tuple[Any, ...]:
    """``piece(x, *rest)``, computed a second time in the backward instead of keeping anything.

    Args:
        piece: Pure and deterministic; returns a tuple.
        x: The one activation that it reads; must not be overwritten by `piece`.
        rest: Constants: tensors without gradient, numbers.
        exact: Keep `x` itself, not its 8-bit codes.
        parameters: Trainable tensors that `piece` uses by itself.

    Returns:
        What `piece` returns.
    """
    wanted = x.requires_grad or any(p.requires_grad for p in parameters)
    if not (torch.is_grad_enabled() and wanted):
        return piece(x, *rest)
    if torch.compiler.is_compiling():  # the compiler keeps by rules of its own
        return checkpoint(piece, x, *rest, use_reentrant=False)  # type: ignore[no-any-return]
    result: tuple[Any, ...] = _Recomputed.apply(
        piece, exact, len(parameters), x, *parameters, *rest
    )
    return result
