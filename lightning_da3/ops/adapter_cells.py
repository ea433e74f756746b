"""What an adapter computes on its cells, and the gradients, without autograd.

Shapes and letters: see `lightning_da3.ops.adapter`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_da3.ops.codes import Rows
from lightning_da3.ops.convolution import conv
from lightning_da3.torch_private.kernels import (
    convolution_backward,
    native_group_norm_backward,
    sigmoid_backward,
    threshold_backward,
)


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

    def halves(self, weights: Weights) -> bool:
        """Whether the hidden map is kept in half precision."""
        return not self.exact and weights.value.dtype == torch.float32


def gradients(
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
    """The gradients of p and of all weights.

    Args:
        kept: The codes of p, p itself if `exact`, or None if no weight of the convolution trains.
        hidden: n in float16, or h.
        rstd: The norm's 1 / standard deviation, (N, 1); None if `hidden` is h.
        noise: Added to s before the decision, (N, G, 1), or None.
        weights: The fields of `Weights`.
        grad_addend: dL/d addend, or None.
        grad_gate: dL/d gate, or None.
        eps: The epsilon of the group norm.
        exact: `kept` is p itself.
        last: See `lightning_da3.ops.codes.Rows`.
        group: See `lightning_da3.ops.codes.Rows`.
        size: The size of p.
        p_dtype: The type of p.
        wants_p: The gradient of p is wanted.
        wants_squeeze: The gradient of the convolution's weight is wanted.
    """
    dtype = weights[0].dtype  # autocast may have lowered what lies between
    w = Weights(*weights)
    norm = Norm.of(hidden.to(dtype), eps) if rstd is None else Norm.again(hidden, rstd)
    cells, logits = _attention(norm.n, w)
    soft = torch.sigmoid(logits)
    grads: list[Tensor | None] = [None] * len(w)
    if grad_addend is None:
        grad_cells, grad_logits = torch.zeros_like(cells), torch.zeros_like(logits)
    else:
        rows = _rows(grad_addend).to(dtype)
        grads[5], grads[6] = torch.mm(rows.t(), soft * cells), rows.sum(0)
        grad_cells = torch.mm(rows, w.value)  # dL/du
        grad_logits = sigmoid_backward((grad_cells * cells).sum(1, keepdim=True), soft)
        grad_cells.mul_(soft)
    if grad_gate is not None:  # straight through: as if it were the sigmoid
        chance = soft if noise is None else torch.sigmoid(logits + noise.view(-1, 1))
        grad_logits = grad_logits + sigmoid_backward(_rows(grad_gate).to(dtype), chance)
    grads[3], grads[4] = torch.mm(grad_logits.t(), cells), grad_logits.sum(0)
    grad_cells.addmm_(grad_logits, w.attend)
    grad_normal = _maps(threshold_backward(grad_cells, cells, 0), hidden.shape)
    grad_hidden, grads[1], grads[2] = norm.backward(grad_normal, w.scale)
    grad_p = None
    if wants_p or wants_squeeze:
        if kept is None:
            p = grad_hidden.new_empty(1).expand(size)  # its shape alone is read
        else:
            p = kept if exact else Rows(last, group, torch.Size(size), p_dtype).decode(kept)
            p = p.to(dtype).contiguous(memory_format=_layout(grad_hidden))
        axes = len(size) - 2
        grad_p, grads[0], _ = convolution_backward(
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


def squeezed(p: Tensor, weight: Tensor) -> Tensor:
    """h, the hidden map."""
    ones = [1] * (p.dim() - 2)
    return conv(p, weight, None, ones, _padding(weight), ones, 1)


def _padding(weight: Tensor) -> list[int]:
    return [side // 2 for side in weight.shape[2:]]


class Norm(NamedTuple):
    """A group norm of one group, before its scale and shift, and what its backward reads."""

    x: Tensor  # (N, m, *grid)
    n: Tensor  # (x - mean) * rstd, (N * G, m)
    mean: Tensor
    rstd: Tensor

    @classmethod
    def of(cls, hidden: Tensor, eps: float) -> Norm:
        """The norm of h, (N, m, *grid)."""
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
    def again(cls, n: Tensor, rstd: Tensor) -> Norm:
        """The norm from what `halved` returned; the mean of h is lost, and nothing reads it."""
        n = n.to(rstd.dtype)
        x = n / rstd.view(-1, *[1] * (n.dim() - 1))
        x = x.contiguous(memory_format=_layout(x))  # before torch 2.13 the kernel takes no other
        return cls(x, _rows(n), torch.zeros_like(rstd), rstd)

    def backward(self, grad: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of x, scale and shift."""
        grad = grad.contiguous(memory_format=_layout(self.x))
        n, m = self.x.shape[:2]
        return native_group_norm_backward(
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


def respond(
    hidden: Tensor, noise: Tensor | None, w: Weights, options: AdapterOptions
) -> tuple[Tensor, Tensor | None, Norm]:
    """The addend, the gate and the norm of an adapter.

    Args:
        hidden: h, (N, m, *grid).
        noise: Added to s before the decision, (N, G, 1), or None.
        w: The parameters.
        options: The settings.
    """
    device = hidden.device.type  # few cells: as precise as the weights
    lowers = torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False) if lowers else contextlib.nullcontext():
        norm = Norm.of(hidden.to(w.value.dtype), options.eps)
        cells, logits = _attention(norm.n, w)
        scaled = torch.sigmoid(logits).mul(cells)
        addend = _maps(torch.addmm(w.value_bias, scaled, w.value.t()), hidden.shape)
        if not options.gated:
            return addend, None, norm
        if noise is not None:
            logits = logits + noise.view(-1, 1)
        return addend, _maps(logits.gt_(0), hidden.shape), norm
