"""A piece of a network that keeps its input, in 8 bits, and is computed again in the backward.

Shapes: any. Kept: the codes of one activation (1/4 of float32; see `lightning_da3.ops.codes`), or
that activation itself if exact; constants that the piece reads as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_da3.ops.bits import dense, has_no_values
from lightning_da3.ops.codes import decode, encode, sample_group
from lightning_da3.ops.decisions import following, noting

Piece = Callable[..., tuple[Any, ...]]


class _How(NamedTuple):
    exact: bool
    random: bool
    group: int  # elements that share a code's range
    trained: int  # parameters, in front of the constants


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, piece: Piece, how: _How, x: Tensor, *rest: Any) -> tuple[Any, ...]:
        ctx.piece, ctx.how = piece, how
        ctx.random = _Random(x.device) if how.random and not has_no_values(x) else None
        ctx.set_materialize_grads(False)
        ctx.autocast = _autocast_of(x.device.type)
        tensors = [r for r in rest if isinstance(r, Tensor)]
        ctx.rest = [None if isinstance(r, Tensor) else r for r in rest]
        kept = x
        if not how.exact:
            x_dense = dense(x.detach())
            ctx.size, ctx.stride, ctx.dtype = x.size(), x_dense.stride(), x.dtype
            kept = encode(x_dense, how.group)
        with noting(not how.exact) as noted:
            outputs = tuple(_owner(y, x) for y in piece(x.view_as(x), *rest[how.trained :]))
        ctx.noted = len(noted)
        ctx.save_for_backward(kept, *noted, *tensors)
        ctx.mark_non_differentiable(
            *[y for y in outputs if isinstance(y, Tensor) and not y.is_floating_point()]
        )
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        noted, tensors = tensors[: ctx.noted], tensors[ctx.noted :]
        if not ctx.how.exact:
            x = decode(x, ctx.size, ctx.stride, ctx.dtype, ctx.how.group)
        waiting = iter(tensors)
        rest = [r if r is not None else next(waiting, None) for r in ctx.rest]
        x = x.detach().requires_grad_(ctx.needs_input_grad[2])
        trained = ctx.how.trained
        parameters = rest[:trained]
        others = [
            cast(Tensor, r).detach().requires_grad_() if needed else r
            for r, needed in zip(rest[trained:], ctx.needs_input_grad[3 + trained :], strict=True)
        ]
        again = contextlib.nullcontext() if ctx.random is None else ctx.random.again()
        decisions = contextlib.nullcontext() if ctx.how.exact else following(noted)
        with torch.enable_grad(), ctx.autocast(), again, decisions:
            outputs = ctx.piece(x, *others)
        wanted = [(y, g) for y, g in zip(outputs, grads, strict=True) if g is not None]
        wanted = [(y, g) for y, g in wanted if y.requires_grad]
        leaves = [
            t if isinstance(t, Tensor) and t.requires_grad else None
            for t in (x, *parameters, *others)
        ]
        sources = [t for t in leaves if t is not None]
        found = iter(
            torch.autograd.grad(
                [y for y, _ in wanted], sources, [g for _, g in wanted], allow_unused=True
            )
            if wanted and sources
            else [None] * len(sources)
        )
        return None, None, *[None if t is None else next(found) for t in leaves]


def _owner(y: Any, x: Tensor) -> Any:
    """`y` as a tensor that is no view: autograd forbids to write into views of a Function."""
    if not isinstance(y, Tensor) or not y._is_view():
        return y
    if y.untyped_storage()._cdata == x.untyped_storage()._cdata:
        return y.clone()
    owner = torch.ops.aten._unsafe_view(y, y.size())  # the same memory, and no view to autograd
    # a view of size 1 along an axis may have another stride there, and seem laid out otherwise
    return owner.as_strided_(y.size(), y.stride(), y.storage_offset())


class _Random:
    """The state of the random number generators, to draw the same numbers again."""

    def __init__(self, device: torch.device) -> None:
        self.devices = [device] if device.type == "cuda" else []
        self.states = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self.devices)]

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Draw what was drawn then; afterwards nothing has been drawn."""
        with torch.random.fork_rng(self.devices):
            torch.set_rng_state(self.states[0])
            for device, state in zip(self.devices, self.states[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
            yield


def _autocast_of(device: str) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    if not torch.is_autocast_enabled(device):
        return contextlib.nullcontext
    dtype = torch.get_autocast_dtype(device)
    return lambda: torch.autocast(device, dtype=dtype)


class _Instead(torch.autograd.Function):
    """The first argument, with the gradient of the second."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, carrier: Tensor) -> Tensor:
        del ctx, carrier
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        del ctx
        return None, grad


def _compiled(piece: Piece, x: Tensor, *rest: Any, exact: bool) -> tuple[Any, ...]:
    """In words that a compiler understands: it keeps what a checkpoint reads.

    The piece stands there twice, but what comes from the codes matters for the backward alone, so
    that the compiler leaves it out of the forward.
    """
    if exact:
        return checkpoint(piece, x, *rest, use_reentrant=False)
    with torch.no_grad():
        outputs = piece(x, *rest)
    group = sample_group(x)
    dense_x = dense(x.detach())
    codes = encode(dense_x, group)
    size, stride, dtype = x.size(), dense_x.stride(), x.dtype

    def from_codes(codes: Tensor, x: Tensor) -> tuple[Any, ...]:
        again = decode(codes, size, stride, dtype, group)
        return piece(_Instead.apply(again, x), *rest)

    carriers = checkpoint(from_codes, codes, x, use_reentrant=False)
    return tuple(
        _Instead.apply(y, carrier) if isinstance(carrier, Tensor) and carrier.requires_grad else y
        for y, carrier in zip(outputs, carriers, strict=True)
    )


def recomputed(
    piece: Piece,
    x: Tensor,
    *rest: Any,
    exact: bool = False,
    parameters: tuple[Tensor, ...] = (),
    random: bool = False,
) -> tuple[Any, ...]:
    """``piece(x, *rest)``, computed a second time in the backward instead of keeping anything.

    Args:
        piece: Pure; returns a tuple.
        x: The one activation that it reads; must not be overwritten by `piece`.
        rest: Kept as they are: mostly constants, and numbers.
        exact: Keep `x` itself, not its 8-bit codes.
        parameters: Trainable tensors that `piece` uses by itself.
        random: `piece` draws random numbers, which must be the same again.

    Returns:
        What `piece` returns.
    """
    tensors = (x, *parameters, *[r for r in rest if isinstance(r, Tensor)])
    wanted = any(tensor.requires_grad for tensor in tensors)
    if not (torch.is_grad_enabled() and wanted):
        return piece(x, *rest)
    if torch.compiler.is_compiling():
        return _compiled(piece, x, *rest, exact=exact)
    how = _How(exact, random, 0 if exact else sample_group(x), len(parameters))
    result: tuple[Any, ...] = _Recomputed.apply(piece, how, x, *parameters, *rest)
    return result
