"""A region of a network that keeps its input, in 8 bits, and is computed again in the backward.

Shapes: any. Kept: codes of the activations it reads (1/4 of float32; see
`lightning_da3.ops.codes`) and what it decided (see `lightning_da3.ops.masks`), or those
activations themselves if exact; and constants that it reads.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_da3.ops.backward import once_differentiable
from lightning_da3.ops.bits import dense, has_no_values, may_lie_otherwise
from lightning_da3.ops.codes import Code, decode, encode, kept_of, read_back, sample_group
from lightning_da3.ops.exportable import is_exportable
from lightning_da3.ops.lent import call_with, parameters_of
from lightning_da3.ops.masks import record_masks, replay_masks
from lightning_da3.ops.smooth import Smooth, widened
from lightning_da3.torch_private.autograd import is_view, storage_key, without_base
from lightning_da3.torch_private.trees import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

Piece = Callable[..., tuple[Any, ...]]


class _Options(NamedTuple):
    exact: bool
    random: bool
    uses: Sequence[nn.Module]
    parameters: int  # of what it uses, in front of the activations
    frozen: tuple[int, ...]  # positions of activations that need no gradient


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, piece: Piece, how: _Options, made: Tensor | None, *inputs: Any
    ) -> tuple[Any, ...]:
        parameters, activations = inputs[: how.parameters], inputs[how.parameters :]
        needed = ctx.needs_input_grad[3 + how.parameters :]
        x = activations[0]
        ctx.piece, ctx.how = piece, how
        ctx.random = _Random(x.device) if how.random and not has_no_values(x) else None
        ctx.set_materialize_grads(False)
        ctx.autocast = autocast_of(x.device.type)
        coded = [i == 0 or need or i in how.frozen for i, need in enumerate(needed)]
        ctx.codes = [
            Code.of(t) if it_is and not how.exact and t.is_floating_point() else None
            for t, it_is in zip(activations, coded, strict=True)
        ]
        ctx.others = [_Kept if isinstance(t, Tensor) else t for t in activations]
        kept = [
            t if code is None else code.encode(t)
            for i, (t, code) in enumerate(zip(activations, ctx.codes, strict=True))
            if isinstance(t, Tensor) and (i or made is None)
        ]
        kept = kept if made is None else [made, *kept]
        with record_masks(not how.exact) as noted:
            outputs = piece(x.view_as(x), *activations[1:])
        outputs = tuple(_owner(y, activations) for y in outputs)
        ctx.noted = len(noted)
        ctx.save_for_backward(*parameters, *noted, *kept)
        ctx.mark_non_differentiable(
            *[y for y in outputs if isinstance(y, Tensor) and not _may_be_differentiated(y)]
        )
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, needed, count = iter(ctx.saved_tensors), ctx.needs_input_grad[3:], ctx.how.parameters
        parameters = list(itertools.islice(saved, count))
        noted = list(itertools.islice(saved, ctx.noted))
        activations = [
            _leaf(next(saved), code, need) if other is _Kept else other
            for other, code, need in zip(ctx.others, ctx.codes, needed[count:], strict=True)
        ]
        inputs = zip((*parameters, *activations), needed, strict=True)
        leaves = [t for t, need in inputs if need]
        again = contextlib.nullcontext() if ctx.random is None else ctx.random.again()
        decisions = contextlib.nullcontext() if ctx.how.exact else replay_masks(noted)
        with torch.enable_grad(), ctx.autocast(), again, decisions:
            outputs = call_with(parameters, ctx.how.uses, ctx.piece, *activations)
        found = iter(_gradients(outputs, leaves, grads))
        return None, None, None, *[next(found) if need else None for need in needed]


def _gradients(
    outputs: Sequence[Any], leaves: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> Sequence[Tensor | None]:
    wanted = [(y, g) for y, g in zip(outputs, grads, strict=True) if g is not None]
    wanted = [(y, g) for y, g in wanted if y.requires_grad]
    if not (wanted and leaves):
        return [None] * len(leaves)
    values, cotangents = zip(*wanted, strict=True)
    return torch.autograd.grad(values, leaves, cotangents, allow_unused=True)


def _may_be_differentiated(y: Tensor) -> bool:
    return y.is_floating_point() or y.is_complex()


class _Flat:
    """A piece that returns tensors and numbers alone, in the place of tuples and lists of them."""

    def __init__(self, piece: Piece) -> None:
        self.piece = piece
        self.spec: TreeSpec | None = None  # of what the piece returned; None: nothing is nested

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        outputs = self.piece(*inputs)
        if all(isinstance(y, Tensor) for y in outputs):
            return outputs
        leaves, self.spec = tree_flatten(outputs)
        return tuple(leaves)

    def nested(self, leaves: tuple[Any, ...]) -> tuple[Any, ...]:
        """What the piece returns, of these leaves."""
        if self.spec is None:
            return leaves
        return tree_unflatten(leaves, self.spec)  # type: ignore[no-any-return]


class _Kept:
    """A stand-in for a tensor that went through `save_for_backward`."""


def _leaf(kept: Tensor, code: Code | None, need: bool) -> Tensor:
    x = read_back(kept, code)
    return x.detach().requires_grad_() if need else x


def _owner(y: Any, inputs: Sequence[Any]) -> Any:
    """`y` as a tensor that is no view: autograd forbids to write into views of a Function."""
    if not isinstance(y, Tensor) or not is_view(y):
        return y
    if is_exportable() or may_lie_otherwise(y):
        return y.clone()
    read = {storage_key(t.untyped_storage()) for t in inputs if isinstance(t, Tensor)}
    if storage_key(y.untyped_storage()) in read:
        return y.clone()
    owner = without_base(y, y.size())
    # a view of size 1 along an axis may have another stride there, and seem laid out otherwise
    return owner.as_strided_(y.size(), y.stride(), y.storage_offset())


class _Random:
    """The state of the random number generators, to draw the same numbers again."""

    def __init__(self, device: torch.device) -> None:
        self.devices = [device] if device.type == "cuda" else []
        self.states = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self.devices)]

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """In the block the same numbers are drawn; afterwards the generators are as before it."""
        with torch.random.fork_rng(self.devices):
            torch.set_rng_state(self.states[0])
            for device, state in zip(self.devices, self.states[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
            yield


def autocast_of(device: str) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """Makes contexts in which autocast on devices of this type does what it does now."""
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


class _Activated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        linear: FrozenMap,
        activation: Activation,
        exact: bool,
        made: Tensor | None,
    ) -> Tensor:
        ctx.linear, ctx.smooth = linear, activation.smooth
        ctx.size, ctx.dtype = x.size(), x.dtype
        kept, ctx.code = kept_of(x, exact, made)
        ctx.autocast = autocast_of(x.device.type)
        with record_masks(not exact) as noted:
            y = activation(linear(x))
        ctx.save_for_backward(kept, *noted)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, *noted = ctx.saved_tensors
        with ctx.autocast():
            y = ctx.linear(read_back(kept, ctx.code))
        wide = widened(as_before(y, ctx.smooth, noted))
        slope = ctx.smooth.backward(widened(grad), wide, wide)  # it reads the first
        return ctx.linear.input_gradient(slope.to(y.dtype), ctx.size).to(ctx.dtype), *[None] * 4


def as_before(x: Tensor, smooth: Smooth, noted: Sequence[Tensor]) -> Tensor:
    """The input of `smooth`, computed again, with the decisions noted of the first one."""
    if not noted:
        return x
    with replay_masks(noted):
        return smooth.settled(x)


class FrozenMap(Protocol):
    """A linear map that never trains."""

    def __call__(self, x: Tensor, /) -> Tensor:
        """``y = W x + b``."""

    def input_gradient(self, grad: Tensor, size: torch.Size, /) -> Tensor:
        """dL/dx, of this size, from dL/dy."""


class Activation(Protocol):
    """A layer that applies one function."""

    smooth: Smooth

    def __call__(self, x: Tensor, /) -> Tensor:
        """``smooth(x)``; may overwrite x."""


def activated(
    x: Tensor,
    linear: FrozenMap,
    activation: Activation,
    *,
    exact: bool = False,
    codes: Tensor | None = None,
) -> Tensor:
    """``silu(conv(x))`` as `recomputed` does it, in fewer operations.

    Its own backward needs neither a graph nor the activation's value.

    Args:
        x: (N, C, *in); not overwritten.
        linear: The convolution.
        activation: The layer behind it; its backward reads its input, its derivative has no jumps.
        exact: Keep `x`, not its codes.
        codes: The codes of `x`, if they exist already.

    Returns:
        (N, O, *out).
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return activation(linear(x))
    made = None if exact else codes
    result: Tensor = _Activated.apply(x, linear, activation, exact, made)
    return result


def _compiled(
    piece: Piece, x: Tensor, *rest: Any, exact: bool, codes: Tensor | None
) -> tuple[Any, ...]:
    """`recomputed` for a compiler, which keeps what a checkpoint reads.

    The piece is called twice, but what comes from the codes matters for the backward alone, so that
    the compiler leaves it out of the forward.
    """
    if exact or not x.is_floating_point():
        return checkpoint(piece, x, *rest, use_reentrant=False)
    with torch.no_grad():
        outputs = piece(x, *rest)
    group = sample_group(x)
    dense_x = dense(x.detach())
    codes = encode(dense_x, group) if codes is None else codes
    size, stride, dtype = x.size(), dense_x.stride(), x.dtype

    def from_codes(codes: Tensor, x: Tensor) -> tuple[Any, ...]:
        again = decode(codes, size, stride, dtype, group)
        return piece(_Instead.apply(again, x), *rest)

    carriers = tree_leaves(checkpoint(from_codes, codes, x, use_reentrant=False))
    leaves, spec = tree_flatten(outputs)
    leaves = [
        _Instead.apply(y, carrier) if isinstance(carrier, Tensor) and carrier.requires_grad else y
        for y, carrier in zip(leaves, carriers, strict=True)
    ]
    return tree_unflatten(leaves, spec)  # type: ignore[no-any-return]


def recomputed(
    piece: Piece,
    x: Tensor,
    *rest: Any,
    exact: bool = False,
    uses: Sequence[nn.Module] = (),
    random: bool = False,
    codes: Tensor | None = None,
    frozen: tuple[int, ...] = (),
) -> tuple[Any, ...]:
    """``piece(x, *rest)``, computed a second time in the backward instead of keeping anything.

    Args:
        piece: Pure; returns a tuple.
        x: An activation that it reads; must not be overwritten by `piece`.
        rest: What else it reads: constants and numbers, kept as they are, and other activations.
        exact: Keep activations themselves, not their 8-bit codes.
        uses: Modules whose parameters `piece` uses by itself.
        random: `piece` draws random numbers, which must be the same again.
        codes: Codes of `x` by `encode` in groups of `sample_group`, if something else keeps them.
        frozen: Positions, `x` being the first, of activations that need no gradient.

    Returns:
        What `piece` returns.
    """
    parameters = parameters_of(uses) if uses else ()
    tensors = (x, *parameters, *[r for r in rest if isinstance(r, Tensor)])
    wanted = any(tensor.requires_grad for tensor in tensors)
    if not (torch.is_grad_enabled() and wanted):
        return piece(x, *rest)
    if torch.compiler.is_compiling():
        return _compiled(piece, x, *rest, exact=exact, codes=codes)
    how = _Options(exact, random, uses, len(parameters), frozen)
    flat = _Flat(piece)
    return flat.nested(_Recomputed.apply(flat, how, codes, *parameters, x, *rest))
