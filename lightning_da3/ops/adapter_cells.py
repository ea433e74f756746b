"""What an adapter computes on its cells, and the gradients, without autograd.

Shapes and letters: see `lightning_da3.ops.adapter`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_da3.ops.bits import pack_between, reshaped, unpack
from lightning_da3.ops.codes import Rows
from lightning_da3.ops.convolution import conv
from lightning_da3.ops.exportable import is_exportable
from lightning_da3.torch_private.kernels import (
    convolution_backward,
    native_group_norm_backward,
    sigmoid_backward,
)

# Of an adapter's addend: with one learning rate for all, the value map, which starts at zero,
# learns so much faster than the head. A power of two: it rounds nothing.
VALUE_SCALE = 4.0


class Weights(NamedTuple):
    """An adapter's parameters.

    Attributes:
        squeeze: The convolution's weight, (m, C, *kernel), kernel sides odd.
        scale: The scale of the group norm, (m,).
        shift: The shift of the group norm, (m,).
        attend: w, (1, m).
        attend_bias: b, (1,).
        value: V, (O, m).
        value_bias: v, (O,).
    """

    squeeze: Tensor
    scale: Tensor
    shift: Tensor
    attend: Tensor
    attend_bias: Tensor
    value: Tensor
    value_bias: Tensor


class AdapterOptions(NamedTuple):
    """The settings of an adapter.

    Attributes:
        eps: The epsilon of the group norm.
        gated: Make a gate.
        exact: Keep p and h themselves.
    """

    eps: float
    gated: bool
    exact: bool


def respond(
    p: Tensor,
    noise: Tensor | None,
    w: Weights,
    options: AdapterOptions,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The addend, the gate, and what is kept beside p: where r > 0, as bits; h if exact.

    Args:
        p: (N, C, *grid).
        noise: Added to s before the decision, (N, G, 1), or None.
        w: The parameters.
        options: The settings.
        dtype: The type of the convolution.
    """
    with _without_autocast(p):  # few cells: as precise as the weights
        hidden = squeezed(p, w.squeeze, dtype)
        if is_exportable():
            return _respond_in_maps(hidden, noise, w, options)
        cells = torch.addcmul(w.shift, Norm.of(hidden, w, options.eps).n, w.scale).relu_()
        logits = _logits(cells, w)
        scaled = torch.sigmoid(logits).mul(cells)
        value = torch.addmm(w.value_bias, scaled, w.value.t(), beta=VALUE_SCALE, alpha=VALUE_SCALE)
        addend = _maps(value, hidden.shape)
        kept = hidden if options.exact else pack_between(cells, 0, math.inf)
        if not options.gated:
            return addend, None, kept
        if noise is not None:
            logits = logits + noise.reshape(-1, 1)
        return addend, _maps(logits.gt_(0), hidden.shape), kept


def _respond_in_maps(
    hidden: Tensor, noise: Tensor | None, w: Weights, options: AdapterOptions
) -> tuple[Tensor, Tensor | None, Tensor]:
    """What `respond` returns, by convolutions alone; bits are packed as maps.

    Runtimes that lay maps out in blocks of channels need not turn them into rows and back.
    """
    x = hidden.to(w.scale.dtype)
    size = x.shape[1:]  # a sample, as its one group: elsewhere that is one operation
    scale, shift = (v.view(-1, *[1] * (len(size) - 1)).expand(size) for v in (w.scale, w.shift))
    cells = F.layer_norm(x, size, scale, shift, options.eps).relu()
    logits = _pointwise(cells, w.attend, w.attend_bias)
    scaled = torch.sigmoid(logits) * cells
    addend = _pointwise(scaled, w.value * VALUE_SCALE, w.value_bias * VALUE_SCALE)
    kept = hidden if options.exact else pack_between(cells, 0, math.inf)
    if not options.gated:
        return addend, None, kept
    if noise is not None:
        logits = logits + noise.reshape(logits.shape)
    return addend, (logits > 0).to(logits.dtype), kept


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A convolution by a matrix (O, C)."""
    ones = [1] * (x.dim() - 2)
    return conv(x, weight.reshape(*weight.shape, *ones), bias, ones, [0] * len(ones), ones, 1)


def gradients(
    kept: Tensor,
    hidden: Tensor,
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
    dtype: torch.dtype,
    wants_p: bool,
    wants_squeeze: bool,
) -> list[Tensor | None]:
    """The gradients of p and of all weights.

    Args:
        kept: The codes of p, or p itself.
        hidden: Where r > 0, as bits; h if `exact`.
        noise: Added to s before the decision, (N, G, 1), or None.
        weights: The fields of `Weights`.
        grad_addend: dL/d addend, or None.
        grad_gate: dL/d gate, or None.
        eps: The epsilon of the group norm.
        exact: `hidden` is h itself.
        last: See `lightning_da3.ops.codes.Rows`.
        group: See `lightning_da3.ops.codes.Rows`; 0: `kept` is p itself.
        size: The size of p.
        p_dtype: The type of p.
        dtype: The type of the convolution.
        wants_p: The gradient of p is wanted.
        wants_squeeze: The gradient of the convolution's weight is wanted.
    """
    w = Weights(*weights)
    p = Rows(last, group, torch.Size(size), p_dtype).decode(kept) if group else kept
    with _without_autocast(p):
        norm = Norm.of(hidden if exact else squeezed(p, w.squeeze, dtype), w, eps)
        cells = torch.addcmul(w.shift, norm.n, w.scale)
        if exact:
            positive = cells > 0
        elif is_exportable():  # packed as maps
            positive = _rows(unpack(hidden, norm.x.size(), norm.x.stride()))
        else:
            positive = unpack(hidden, cells.size(), cells.stride())
        cells.mul_(positive)
        logits = _logits(cells, w)
        soft = torch.sigmoid(logits)
        grads: list[Tensor | None] = [None] * len(w)
        if grad_addend is None:
            grad_cells, grad_logits = torch.zeros_like(cells), torch.zeros_like(logits)
        else:
            rows = _rows(grad_addend).to(cells.dtype)
            grads[5] = torch.mm(rows.t(), soft * cells).mul_(VALUE_SCALE)
            grads[6] = rows.sum(0).mul_(VALUE_SCALE)
            grad_cells = torch.mm(rows, w.value).mul_(VALUE_SCALE)  # dL/du
            grad_logits = sigmoid_backward((grad_cells * cells).sum(1, keepdim=True), soft)
            grad_cells.mul_(soft)
        if grad_gate is not None:  # straight through: as if it were the sigmoid
            chance = soft if noise is None else torch.sigmoid(logits + noise.reshape(-1, 1))
            grad_logits = grad_logits + sigmoid_backward(_rows(grad_gate).to(soft.dtype), chance)
        grads[3], grads[4] = torch.mm(grad_logits.t(), cells), grad_logits.sum(0)
        grad_cells.addmm_(grad_logits, w.attend).mul_(positive)
        grad_hidden, grads[1], grads[2] = norm.backward(grad_cells, w.scale)
        grad_p = None
        if wants_p or wants_squeeze:
            axes = len(size) - 2
            grad_p, grads[0], _ = convolution_backward(
                grad_hidden,
                p.to(grad_hidden.dtype).contiguous(memory_format=_layout(grad_hidden)),
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


def squeezed(p: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """h, the hidden map, in `dtype`."""
    ones = [1] * (p.dim() - 2)
    return conv(p.to(dtype), weight.to(dtype), None, ones, _padding(weight), ones, 1)


def _padding(weight: Tensor) -> list[int]:
    return [side // 2 for side in weight.shape[2:]]


def _without_autocast(p: Tensor) -> contextlib.AbstractContextManager[object]:
    device = p.device.type
    lowers = torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if lowers else contextlib.nullcontext()


class Norm(NamedTuple):
    """A group norm of one group, before its scale and shift, and what its backward reads."""

    x: Tensor  # (N, m, *grid)
    n: Tensor  # (x - mean) * rstd, (N * G, m)
    mean: Tensor
    rstd: Tensor

    @classmethod
    def of(cls, hidden: Tensor, w: Weights, eps: float) -> Norm:
        """The norm of h, (N, m, *grid), as precise as the weights."""
        x = hidden.to(w.scale.dtype).contiguous(memory_format=_layout(hidden))
        n, m = x.shape[:2]
        if is_exportable():  # in few operations; mean and rstd are (N, 1, 1)
            cells = _rows(x).view(n, -1, m)
            mean = cells.mean((1, 2), keepdim=True)
            centred = cells - mean
            rstd = centred.square().mean((1, 2), keepdim=True).add(eps).rsqrt()
            return cls(x, (centred * rstd).view(-1, m), mean, rstd)
        normal, mean, rstd = torch.native_group_norm(
            x, None, None, n, m, x.shape[2:].numel(), 1, eps
        )
        # bits are packed as values lie in memory, which may be another order in the backward
        return cls(x, _rows(normal).contiguous(), mean, rstd)

    def backward(self, grad: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of x, scale and shift, from that of the result, (N * G, m)."""
        if is_exportable():
            n, m = self.x.shape[:2]
            normal, scaled = self.n.view(n, -1, m), (grad * scale).view(n, -1, m)
            common = scaled.mean((1, 2), keepdim=True)
            slope = (scaled * normal).mean((1, 2), keepdim=True)
            grad_x = (scaled - common - normal * slope) * self.rstd
            return _maps(grad_x.view(-1, m), self.x.shape), (grad * self.n).sum(0), grad.sum(0)
        grad = _maps(grad, self.x.shape).contiguous(memory_format=_layout(self.x))
        n, m = self.x.shape[:2]
        return native_group_norm_backward(
            *(grad, self.x, self.mean, self.rstd, scale),
            *(n, m, self.x.shape[2:].numel(), 1, [True, True, True]),
        )


def _logits(cells: Tensor, w: Weights) -> Tensor:
    return torch.addmm(w.attend_bias, cells, w.attend.t())


def _layout(x: Tensor) -> torch.memory_format:
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _rows(x: Tensor) -> Tensor:
    """(N, C, *grid) as (N * G, C), a view if the channels lie last in memory."""
    return reshaped(x.permute(0, *range(2, x.dim()), 1), -1, x.shape[1])


def _maps(rows: Tensor, size: torch.Size) -> Tensor:
    """(N * G, O) as (N, O, *grid), a view that lies in memory as channels_last does."""
    last = len(size) - 1
    return rows.view(size[0], *size[2:], rows.shape[1]).permute(0, last, *range(1, last))
