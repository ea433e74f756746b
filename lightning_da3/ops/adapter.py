"""An adapter's whole computation as one op, so that a handful of cells costs a handful of calls.

Shapes: p (N, C, *grid) of G cells, m hidden channels, O outputs; ``h = conv(p)`` (N, m, *grid),
``r = relu(norm(h))``, ``s = w . r + b`` (N * G, 1), ``u = sigmoid(s) r``, addend ``4 (V u + v)``
and gate ``1[s + noise > 0]``.
Kept: the 8-bit codes of p, or others that it follows from; and where r is above zero, one bit an
element. If exact, p and h themselves. Everything else is computed again in the backward, h from the
codes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_da3.ops.activated import ValueCode
from lightning_da3.ops.adapter_cells import AdapterOptions, Weights, gradients, respond
from lightning_da3.ops.backward import once_differentiable
from lightning_da3.ops.codes import Rows
from lightning_da3.ops.opaque_adapter import opaque_adapt, opaque_gradients
from lightning_da3.ops.opaque_convolution import lowered


class KeptInput(NamedTuple):
    """What an adapter keeps of p.

    Attributes:
        tensor: The codes of p, or of what it is a function of; p itself if exact.
        how: How to read them; None if exact.
    """

    tensor: Tensor
    how: Rows | ValueCode | None

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
        kept: KeptInput,
        options: AdapterOptions,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        w = Weights(*weights)
        ctx.options, ctx.how = options, kept.how
        ctx.rows = kept.how if isinstance(kept.how, Rows) else Rows.of(p)._replace(group=0)
        ctx.dtype = lowered(p, w.squeeze.dtype)
        if torch.compiler.is_compiling():
            addend, gate, hidden = opaque_adapt(p, noise, w, options, ctx.dtype)
        else:
            addend, gate, hidden = respond(p, noise, w, options, ctx.dtype)
        ctx.save_for_backward(kept.tensor, hidden, noise, *weights)
        ctx.set_materialize_grads(False)
        return addend, gate

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_addend: Tensor | None, grad_gate: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        kept, hidden, noise, *weights = ctx.saved_tensors
        if isinstance(ctx.how, ValueCode):
            kept = ctx.how.decode(kept)
        wants_p, wants_squeeze = ctx.needs_input_grad[0], ctx.needs_input_grad[4]
        arguments = (
            *(kept, hidden, noise, weights, grad_addend, grad_gate),
            *(ctx.options.eps, ctx.options.exact, *ctx.rows, ctx.dtype, wants_p, wants_squeeze),
        )
        compute = opaque_gradients if torch.compiler.is_compiling() else gradients
        grad_p, *grads = compute(*arguments)
        return grad_p, None, None, None, *grads


def keep(p: Tensor, weights: Weights, options: AdapterOptions) -> KeptInput | None:
    """What `adapt` will keep of `p`, for others to use; None if it keeps nothing."""
    needed = p.requires_grad or any(weight.requires_grad for weight in weights)
    return KeptInput.of(p, options.exact) if torch.is_grad_enabled() and needed else None


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
        kept: What `keep` made of p; None: it is made here.

    Returns:
        The addend (N, O, *grid) and the gate (N, 1, *grid), zeros and ones, or None.
    """
    kept = keep(p, weights, options) if kept is None else kept
    if kept is None:
        return respond(p, noise, weights, options, lowered(p, weights.squeeze.dtype))[:2]
    result: tuple[Tensor, Tensor | None] = _Adapt.apply(p, noise, kept, options, *weights)
    return result
