"""Smooth elementwise activations that keep a code of their derivative.

Shapes: x, y: any. Kept: f'(x) as a code of 8 bits (1/4 of float32), on a grid that spans the range
of f', known beforehand. The value is exact; the gradient is off by at most half a step of the grid,
1/510 of that range, times the incoming gradient. Plain PyTorch keeps the whole input or output.
After Few-bit Backward (arXiv 2202.00441), which fits uneven grids to each function; an even one
needs no table, and eight bits leave it little to gain.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_da3.errors import ConfigError
from lightning_da3.ops.backward import once_differentiable
from lightning_da3.ops.codes import to_bytes
from lightning_da3.ops.masks import computed_twice, settled
from lightning_da3.torch_private.kernels import (
    elu_backward,
    gelu_backward,
    hardswish_backward,
    mish_backward,
    sigmoid_backward,
    silu_backward,
    softplus_backward,
    tanh_backward,
)


@dataclass(frozen=True)
class Smooth:
    """An elementwise function with a bounded derivative.

    Functions are those of a module, or partials of them, so that what holds one can be pickled.

    Attributes:
        name: The function's name, for messages.
        value: ``y = value(x)``, a new tensor.
        backward: ``dL/dx = backward(dL/dy, x, y)``, a new tensor, in float32 or float64; reads x
            alone, or y alone.
        low: Lowest value of the derivative.
        high: Highest value of the derivative.
        jumps: The two points at which the derivative jumps, if it does.
        write: ``y = write(x)``, in the memory of x, if there is such a function.
        reads_value: The backward reads y.
        bend: Highest absolute value of the second derivative; infinite if the derivative jumps, or
            nobody knows.
    """

    name: str
    value: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor], Tensor]
    low: float
    high: float
    jumps: tuple[float, float] | None = None
    write: Callable[[Tensor], Tensor] | None = None
    reads_value: bool = False
    bend: float = math.inf

    def derivative(self, x: Tensor, y: Tensor) -> Tensor:
        """f'(x) of x and ``y = f(x)``, a new tensor."""
        return self.backward(torch.ones_like(x), x, y)

    def evaluate(self, x: Tensor, inplace: bool) -> Tensor:
        """The function of `x`, in its memory if `inplace`."""
        if not inplace:
            return self.value(x)
        return x.copy_(self.value(x)) if self.write is None else self.write(x)

    def settled(self, x: Tensor) -> Tensor:
        """`x`; computed a second time, every element on the side of the jumps where it was."""
        return x if self.jumps is None else settled(x, *self.jumps)

    @property
    def step(self) -> float:
        """The distance of two codes; a decoded derivative is off by at most half of it."""
        return (self.high - self.low) / 255


def quantized_grad_activation(x: Tensor, smooth: Smooth, inplace: bool = False) -> Tensor:
    """`smooth` of `x`, exact; the gradient is computed with codes of the derivative.

    The derivative is off by at most ``smooth.step / 2`` from PyTorch's own, which takes those of
    sigmoid and tanh from the result, as rounded to its type.

    Args:
        x: Any shape, of a floating type.
        smooth: The function.
        inplace: Write the result into `x`.

    Returns:
        Same shape and type. Keeps a byte an element if a gradient is needed.
    """
    if computed_twice():  # there nothing is kept for long, and PyTorch's own backward is quicker
        x = smooth.settled(x)
        return smooth.value(x) if torch.is_grad_enabled() else smooth.evaluate(x, inplace)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return smooth.evaluate(x, inplace)
    result: Tensor = _Coded.apply(x, smooth, inplace)
    return result


class _Coded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, smooth: Smooth, inplace: bool) -> Tensor:
        y = smooth.value(x)
        ctx.low, ctx.step, ctx.dtype = smooth.low, smooth.step, x.dtype
        slopes = smooth.derivative(widened(x), widened(y))
        # elementwise results are dense, and in the memory order of x, whatever x is
        codes = to_bytes(slopes.mul_(1.0 / ctx.step).add_(0.5 - ctx.low / ctx.step))
        ctx.save_for_backward(codes)
        if not inplace:
            return y
        ctx.mark_dirty(x)
        x.copy_(y)
        return x  # the argument itself, as torch.compile needs it

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (codes,) = ctx.saved_tensors
        slopes = widened(codes, grad.dtype).mul_(ctx.step).add_(ctx.low)
        return slopes.mul_(grad).to(ctx.dtype), None, None


def widened(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`x` in float32 at least: half precision is coarser than the codes."""
    return x.to(torch.promote_types(dtype or x.dtype, torch.float32))


# --- the backward of PyTorch's own functions, one vectorised pass each


def _silu(grad: Tensor, x: Tensor, _: Tensor) -> Tensor:
    return silu_backward(grad, x)


def _gelu(grad: Tensor, x: Tensor, _: Tensor, approximate: str) -> Tensor:
    return gelu_backward(grad, x, approximate=approximate)


def _hardswish(grad: Tensor, x: Tensor, _: Tensor) -> Tensor:
    return hardswish_backward(grad, x)


def _mish(grad: Tensor, x: Tensor, _: Tensor) -> Tensor:
    return mish_backward(grad, x)


def _sigmoid(grad: Tensor, _: Tensor, y: Tensor) -> Tensor:
    return sigmoid_backward(grad, y)


def _tanh(grad: Tensor, _: Tensor, y: Tensor) -> Tensor:
    return tanh_backward(grad, y)


def _elu(
    grad: Tensor, x: Tensor, _: Tensor, alpha: float, scale: float, input_scale: float
) -> Tensor:
    return elu_backward(grad, alpha, scale, input_scale, False, x)


def _softplus(grad: Tensor, x: Tensor, _: Tensor, beta: float, threshold: float) -> Tensor:
    return softplus_backward(grad, x, beta, threshold)


def _softsign(grad: Tensor, x: Tensor, _: Tensor) -> Tensor:
    return x.abs().add_(1.0).square_().reciprocal_().mul_(grad)


def _logsigmoid(grad: Tensor, x: Tensor, _: Tensor) -> Tensor:
    return x.neg().sigmoid_().mul_(grad)


def _tanhshrink(grad: Tensor, x: Tensor, _: Tensor) -> Tensor:
    return x.tanh().square_().mul_(grad)


# --- the functions of torch.nn


def _into(value: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    return partial(value, inplace=True)


_ALPHA, _SCALE = 1.6732632423543772, 1.0507009873554805  # SELU's constants
_GELU = {  # extremes of the derivative; of erf: Phi(t) + t phi(t), t = sqrt(2)
    "none": (-0.12890414518515483, 1.1289041451851548),
    "tanh": (-0.12899306865877194, 1.1289930686587719),
}


def gelu(approximate: str = "none") -> Smooth:
    """`torch.nn.GELU`; `approximate` is ``"none"`` or ``"tanh"``."""
    if approximate not in _GELU:
        raise ConfigError(f"`approximate` must be 'none' or 'tanh', got {approximate!r}.")
    value = partial(F.gelu, approximate=approximate)
    backward = partial(_gelu, approximate=approximate)
    return Smooth("gelu", value, backward, *_GELU[approximate], bend=math.sqrt(2 / math.pi))


def elu(alpha: float = 1.0) -> Smooth:
    """`torch.nn.ELU`."""
    backward = partial(_elu, alpha=alpha, scale=1.0, input_scale=1.0)
    ends = min(0.0, alpha), max(1.0, alpha)
    bend = 1.0 if alpha == 1.0 else math.inf  # else it jumps at 0
    return Smooth("elu", partial(F.elu, alpha=alpha), backward, *ends, bend=bend)


def celu(alpha: float = 1.0) -> Smooth:
    """`torch.nn.CELU`; below 0, `alpha` would make the derivative unbounded."""
    if alpha <= 0.0:
        raise ConfigError(f"`alpha` must be above 0, got {alpha}.")
    backward = partial(_elu, alpha=alpha, scale=1.0, input_scale=1.0 / alpha)
    return Smooth("celu", partial(F.celu, alpha=alpha), backward, 0.0, 1.0, bend=1.0 / alpha)


def softplus(beta: float = 1.0, threshold: float = 20.0) -> Smooth:
    """`torch.nn.Softplus`."""
    value = partial(F.softplus, beta=beta, threshold=threshold)
    backward = partial(_softplus, beta=beta, threshold=threshold)
    jump = math.exp(-threshold)  # of the derivative at the threshold, at most
    bend = abs(beta) / 4 if jump < 1e-6 else math.inf
    return Smooth("softplus", value, backward, 0.0, 1.0, bend=bend)


SMOOTH: dict[str, Smooth] = {
    smooth.name: smooth
    for smooth in (
        Smooth(
            "silu",
            F.silu,
            _silu,
            -0.09983932012886694,
            1.099839320128867,
            write=_into(F.silu),
            bend=0.5,
        ),
        Smooth(
            "hardswish",
            F.hardswish,
            _hardswish,
            -0.5,
            1.5,
            jumps=(-3.0, 3.0),
            write=_into(F.hardswish),
        ),
        Smooth(
            "mish",
            F.mish,
            _mish,
            -0.11252612238946262,
            1.088498161251728,
            write=_into(F.mish),
            bend=0.6443,
        ),
        Smooth(
            "sigmoid",
            torch.sigmoid,
            _sigmoid,
            0.0,
            0.25,
            write=torch.sigmoid_,
            reads_value=True,
            bend=0.0963,
        ),
        Smooth("logsigmoid", F.logsigmoid, _logsigmoid, 0.0, 1.0, bend=0.25),
        Smooth("tanh", torch.tanh, _tanh, 0.0, 1.0, reads_value=True, bend=0.7699),
        Smooth("tanhshrink", F.tanhshrink, _tanhshrink, 0.0, 1.0, bend=0.7699),
        Smooth("softsign", F.softsign, _softsign, 0.0, 1.0, bend=2.0),
        Smooth(
            "selu",
            F.selu,
            partial(_elu, alpha=_ALPHA, scale=_SCALE, input_scale=1.0),
            0.0,
            _ALPHA * _SCALE,
            jumps=(0.0, math.inf),
        ),
        gelu(),
        elu(),
        celu(),
        softplus(),
    )
}
"""Functions by name, with PyTorch's defaults; for others see `gelu`, `elu`, `celu`, `softplus`."""
