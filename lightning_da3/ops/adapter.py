"""An adapter's whole computation as one op, so that a handful of cells costs a handful of calls.

Shapes: p (N, C, *grid) of G cells, m hidden channels, O outputs; ``h = conv(p)`` (N, m, *grid),
``r = relu(norm(h))``, ``s = w . r + b`` (N * G, 1), ``u = sigmoid(s) r``, addend ``V u + v`` and
gate ``1[s + noise > 0]``.
Kept: the 8-bit codes of p (p itself if exact) for the gradient of the convolution's weight, and h,
of few channels; everything behind h is computed again in the backward. The norm leaves nothing of
h but ``n = (h - mean) * rstd``, which is bounded: kept are n in float16 and rstd (N, 1), h itself
if exact.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_da3.ops.codes import Rows
from lightning_da3.ops.convolution import conv
from lightning_da3.ops.opaque import lowered

_aten = torch.ops.aten


class Weights(NamedTuple):
    """An adapter's parameters.

    Attributes:
        squeeze: (m, C, *kernel), kernel sides odd.
        scale: Of the group norm, (m,).
        shift: Likewise.
        attend: (1, m).
        attend_bias: (1,).
        value: (O, m).
        value_bias: (O,).
    """

    squeeze: Tensor
    scale: Tensor
    shift: Tensor
    attend: Tensor
    attend_bias: Tensor
    value: Tensor
    value_bias: Tensor


class AdapterOptions(NamedTuple):
    """What is no tensor.

    Attributes:
        eps: Of the group norm.
        gated: Make a gate.
        exact: Keep p and h themselves.
    """

    eps: float
    gated: bool
    exact: bool

    def halves(self, weights: Weights) -> bool:
        """Whether the hidden map is kept in half precision."""
        return not self.exact and weights.value.dtype == torch.float32


class KeptInput(NamedTuple):
    """What an adapter keeps of p.

    Attributes:
        tensor: The codes of p, or p itself if exact.
        rows: AdapterOptions it is coded; None if exact.
    """

    tensor: Tensor
    rows: Rows | None

    @classmethod
    def of(cls, p: Tensor, exact: bool) -> KeptInput:
        """Codes of `p`, or `p`."""
        if exact:
            return cls(p, None)
        rows = Rows.of(p)
        return cls(rows.encode(p), rows)


class _Adapt(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        p: Tensor,
        noise: Tensor | None,
        kept: KeptInput | None,
        options: AdapterOptions,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        w = Weights(*weights)
        ctx.options, ctx.like = options, (p.size(), p.dtype)
        ctx.rows = Rows.of(p) if kept is None or kept.rows is None else kept.rows
        if torch.compiler.is_compiling():
            addend, gate, *hidden = _opaque(p, noise, w, options)
        else:
            squeezed = _squeezed(p, w.squeeze)
            addend, gate, norm = _respond(squeezed, noise, w, options)
            hidden = [*norm.halved()] if options.halves(w) else [squeezed, None]
        saved = None if kept is None else kept.tensor
        ctx.save_for_backward(saved, *hidden, noise, *weights)
        ctx.set_materialize_grads(False)
        return addend, gate

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_addend: Tensor | None, grad_gate: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        kept, hidden, rstd, noise, *weights = ctx.saved_tensors
        size, dtype = ctx.like
        wants_p, wants_squeeze = ctx.needs_input_grad[0], ctx.needs_input_grad[4]
        arguments = (
            *(kept, hidden, rstd, noise, weights, grad_addend, grad_gate),
            *(ctx.options.eps, ctx.options.exact, ctx.rows.last, ctx.rows.group),
            *(size, dtype, wants_p, wants_squeeze),
        )
        if torch.compiler.is_compiling():
            found = _opaque_gradients(*arguments)
            grad_p, *grads = [None if g.numel() == 0 else g for g in found]
        else:
            grad_p, *grads = _gradients(*arguments)
        return grad_p, None, None, None, *grads


def _gradients(
    kept: Tensor | None,
    hidden: Tensor,
    rstd: Tensor | None,
    noise: Tensor | None,
    weights: Sequence[Tensor],
    grad_addend: Tensor | None,
    grad_gate: Tensor | None,
    eps: float,
    exact: bool,
    last: bool,
    group: int,
    size: Sequence[int],
    p_dtype: torch.dtype,
    wants_p: bool,
    wants_squeeze: bool,
) -> list[Tensor | None]:
    """Of p, then of all weights; arguments as an op takes them."""
    dtype = weights[0].dtype  # autocast may have lowered what lies between
    w = Weights(*weights)
    norm = _Norm.of(hidden.to(dtype), eps) if rstd is None else _Norm.again(hidden, rstd)
    cells, logits = _attention(norm.n, w)
    soft = torch.sigmoid(logits)
    grads: list[Tensor | None] = [None] * len(w)
    if grad_addend is None:
        grad_cells, grad_logits = torch.zeros_like(cells), torch.zeros_like(logits)
    else:
        rows = _rows(grad_addend).to(dtype)
        grads[5], grads[6] = torch.mm(rows.t(), soft * cells), rows.sum(0)
        grad_cells = torch.mm(rows, w.value)  # of u, so far
        grad_logits = _aten.sigmoid_backward((grad_cells * cells).sum(1, keepdim=True), soft)
        grad_cells.mul_(soft)
    if grad_gate is not None:  # straight through: as if it were the sigmoid
        chance = soft if noise is None else torch.sigmoid(logits + noise.view(-1, 1))
        grad_logits = grad_logits + _aten.sigmoid_backward(_rows(grad_gate).to(dtype), chance)
    grads[3], grads[4] = torch.mm(grad_logits.t(), cells), grad_logits.sum(0)
    grad_cells.addmm_(grad_logits, w.attend)
    grad_normal = _maps(_aten.threshold_backward(grad_cells, cells, 0), hidden.shape)
    grad_hidden, grads[1], grads[2] = norm.backward(grad_normal, w.scale)
    grad_p = None
    if wants_p or wants_squeeze:
        if kept is None:
            p = grad_hidden.new_empty(1).expand(size)  # its shape alone is read
        else:
            p = kept if exact else Rows(last, group, torch.Size(size), p_dtype).decode(kept)
            p = p.to(dtype).contiguous(memory_format=_layout(grad_hidden))
        axes = len(size) - 2
        grad_p, grads[0], _ = _aten.convolution_backward(
            grad_hidden,
            p,
            w.squeeze,
            None,
            [1] * axes,
            _padding(w.squeeze),
            [1] * axes,
            False,
            [0] * axes,
            1,
            [wants_p, wants_squeeze, False],
        )
        grad_p = None if grad_p is None else grad_p.to(p_dtype)
    return [grad_p, *grads]


def _squeezed(p: Tensor, weight: Tensor) -> Tensor:
    ones = [1] * (p.dim() - 2)
    return conv(p, weight, None, ones, _padding(weight), ones, 1)


def _padding(weight: Tensor) -> list[int]:
    return [side // 2 for side in weight.shape[2:]]


class _Norm(NamedTuple):
    """A group norm of one group, before its scale and shift, and what its backward reads."""

    x: Tensor  # (N, m, *grid)
    n: Tensor  # (x - mean) * rstd, (N * G, m)
    mean: Tensor
    rstd: Tensor

    @classmethod
    def of(cls, hidden: Tensor, eps: float) -> _Norm:
        """Of h, (N, m, *grid)."""
        x = hidden.contiguous(memory_format=_layout(hidden))
        n, m = x.shape[:2]
        normal, mean, rstd = torch.native_group_norm(
            x, None, None, n, m, x.shape[2:].numel(), 1, eps
        )
        return cls(x, _rows(normal), mean, rstd)

    def halved(self) -> tuple[Tensor, Tensor]:
        """n, (N, m, *grid) in float16, and rstd."""
        return _maps(self.n, self.x.shape).half(), self.rstd

    @classmethod
    def again(cls, n: Tensor, rstd: Tensor) -> _Norm:
        """From what `halved` made of it; the mean of h is lost, and nothing reads that."""
        n = n.to(rstd.dtype)
        x = n / rstd.view(-1, *[1] * (n.dim() - 1))
        return cls(x, _rows(n), torch.zeros_like(rstd), rstd)

    def backward(self, grad: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of x, scale and shift."""
        grad = grad.contiguous(memory_format=_layout(self.x))
        n, m = self.x.shape[:2]
        return _aten.native_group_norm_backward(  # type: ignore[no-any-return]
            *(grad, self.x, self.mean, self.rstd, scale),
            *(n, m, self.x.shape[2:].numel(), 1, [True, True, True]),
        )


def _attention(n: Tensor, w: Weights) -> tuple[Tensor, Tensor]:
    """r (N * G, m) and s (N * G, 1)."""
    cells = torch.addcmul(w.shift, n, w.scale).relu_()
    return cells, torch.addmm(w.attend_bias, cells, w.attend.t())


def _layout(x: Tensor) -> torch.memory_format:
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _rows(x: Tensor) -> Tensor:
    """(N, C, *grid) as (N * G, C), a view if the channels lie last in memory."""
    return x.permute(0, *range(2, x.dim()), 1).reshape(-1, x.shape[1])


def _maps(rows: Tensor, size: torch.Size) -> Tensor:
    """(N * G, O) as (N, O, *grid), a view that lies in memory as channels_last does."""
    last = len(size) - 1
    return rows.view(size[0], *size[2:], rows.shape[1]).permute(0, last, *range(1, last))


def _respond(
    hidden: Tensor, noise: Tensor | None, w: Weights, options: AdapterOptions
) -> tuple[Tensor, Tensor | None, _Norm]:
    """Addend, gate and the norm."""
    device = hidden.device.type  # few cells: as precise as the weights
    lowers = torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False) if lowers else contextlib.nullcontext():
        norm = _Norm.of(hidden.to(w.value.dtype), options.eps)
        cells, logits = _attention(norm.n, w)
        scaled = torch.sigmoid(logits).mul(cells)
        addend = _maps(torch.addmm(w.value_bias, scaled, w.value.t()), hidden.shape)
        if not options.gated:
            return addend, None, norm
        if noise is not None:
            logits = logits + noise.view(-1, 1)
        return addend, _maps(logits.gt_(0), hidden.shape), norm


# Compiled, forward and backward are one operation each: of what lies between, the compiler would
# keep more than eager mode does, and copies of weights in the layouts that it prefers.


def _all_of_it(
    p: Tensor,
    noise: Tensor | None,
    weights: Sequence[Tensor],
    eps: float,
    gated: bool,
    exact: bool,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Addend, hidden map, and if there are such, rstd and gate.

    `dtype` is the convolution's.
    """
    w, options = Weights(*weights), AdapterOptions(eps, gated, exact)
    with torch.no_grad(), torch.autocast(p.device.type, enabled=False):
        hidden = _squeezed(p.to(dtype), w.squeeze.to(dtype))
    hidden = hidden.contiguous(memory_format=_preferred(hidden))
    addend, gate, norm = _respond(hidden, noise, w, options)
    results = [addend, *(norm.halved() if options.halves(w) else [hidden])]
    results = results if gate is None else [*results, gate]
    # a batch of one may be laid out otherwise with values than without
    return [r.contiguous(memory_format=_preferred(r)) for r in results]


def _all_gradients(*arguments: Any) -> list[Tensor]:
    """Those of p and all weights; empty where there is none."""
    found = _gradients(*arguments)
    empty = torch.empty(0, device=arguments[1].device)
    return [
        empty.clone() if g is None else g.contiguous(memory_format=_preferred(g)) for g in found
    ]


def _preferred(x: Tensor) -> torch.memory_format:
    """A layout that depends on the shape alone: the compiler must know it beforehand."""
    return torch.channels_last if x.dim() == 4 else torch.contiguous_format


_opaque_adapt = torch.library.custom_op(
    "lightning_da3::adapt",
    _all_of_it,
    mutates_args=(),
    schema=(
        "(Tensor p, Tensor? noise, Tensor[] weights, float eps, bool gated, bool exact,"
        " ScalarType dtype) -> Tensor[]"
    ),
)
_opaque_adapt.register_fake(_all_of_it)  # it computes shapes as well as values
_opaque_gradients = torch.library.custom_op(
    "lightning_da3::adapt_backward",
    _all_gradients,
    mutates_args=(),
    schema=(
        "(Tensor? kept, Tensor hidden, Tensor? rstd, Tensor? noise, Tensor[] weights,"
        " Tensor? grad_addend, Tensor? grad_gate, float eps, bool exact, bool last, int group,"
        " SymInt[] size, ScalarType p_dtype, bool wants_p, bool wants_squeeze) -> Tensor[]"
    ),
)
_opaque_gradients.register_fake(_all_gradients)


def _opaque(
    p: Tensor, noise: Tensor | None, w: Weights, options: AdapterOptions
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Addend, gate, hidden map and rstd."""
    dtype = lowered(p, w.squeeze.dtype)
    addend, hidden, *rest = _opaque_adapt(
        p, noise, list(w), options.eps, options.gated, options.exact, dtype
    )
    rstd = rest.pop(0) if options.halves(w) else None
    return addend, rest[0] if options.gated else None, hidden, rstd


def keep(p: Tensor, weights: Weights, options: AdapterOptions) -> KeptInput | None:
    """What `adapt` will keep of `p`, for others to use."""
    needed = torch.is_grad_enabled() and weights.squeeze.requires_grad
    return KeptInput.of(p, options.exact) if needed else None


def adapt(
    p: Tensor,
    noise: Tensor | None,
    weights: Weights,
    options: AdapterOptions,
    kept: KeptInput | None = None,
) -> tuple[Tensor, Tensor | None]:
    """What an adapter adds, and where it lets the host run.

    The gradient of the gate is that of ``sigmoid(s + noise)`` (straight-through).

    Args:
        p: (N, C, *grid).
        noise: Added to s before the decision, (N, G, 1), or None.
        weights: The adapter's parameters.
        options: See `AdapterOptions`.
        kept: Of p, if `keep` has made it.

    Returns:
        The addend (N, O, *grid) and the gate (N, 1, *grid), zeros and ones, or None.
    """
    needed = p.requires_grad or any(weight.requires_grad for weight in weights)
    if not (torch.is_grad_enabled() and needed):
        addend, gate, _ = _respond(_squeezed(p, weights.squeeze), noise, weights, options)
        return addend, gate
    kept = keep(p, weights, options) if kept is None else kept
    result: tuple[Tensor, Tensor | None] = _Adapt.apply(p, noise, kept, options, *weights)
    return result
