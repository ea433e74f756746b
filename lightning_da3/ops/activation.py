"""Piecewise linear activations that keep one bit an element.

Shapes: x, y: any. Kept: the bits of ``low < x < high`` (1/32 of float32), where the slope is 1;
everywhere else it is a constant. Plain PyTorch keeps the whole output.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_da3.ops.backward import once_differentiable
from lightning_da3.ops.bits import dense, pack_between, unpack
from lightning_da3.ops.exportable import is_exportable
from lightning_da3.ops.masks import recorded


class Slopes(NamedTuple):
    """ReLU, ReLU6, Hardtanh or leaky ReLU.

    Attributes:
        low: Where the slope becomes 1.
        high: Where the slope stops being 1.
        slope: Slope outside ``(low, high)``; if not 0, `low` must be 0 and `high` infinite.
    """

    low: float = 0.0
    high: float = math.inf
    slope: float = 0.0

    def evaluate(self, x: Tensor, inplace: bool) -> Tensor:
        """The activation of `x`."""
        if self.slope != 0.0:
            return F.leaky_relu_(x, self.slope) if inplace else F.leaky_relu(x, self.slope)
        if self.low == 0.0 and math.isinf(self.high):
            return x.relu_() if inplace else x.relu()
        return F.hardtanh(x, self.low, self.high, inplace=inplace)

    def pack(self, x: Tensor) -> Tensor:
        """The bits of a dense `x` that the backward needs."""
        return pack_between(x, self.low, self.high)

    def gradient(
        self, grad: Tensor, bits: Tensor, size: torch.Size, stride: tuple[int, ...]
    ) -> Tensor:
        """dL/dx, a new tensor, from dL/dy and the bits of x, of this shape and layout."""
        # in the type of the gradient: products of two types are slower on CPU
        slopes = unpack(bits, size, stride).to(grad.dtype)
        if self.slope != 0.0:
            slopes.mul_(1.0 - self.slope).add_(self.slope)
        return slopes.mul_(grad)  # in the layout of x, whatever the gradient came in


RELU = Slopes()


class _PiecewiseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slopes: Slopes, inplace: bool, bits: Tensor | None) -> Tensor:
        x_dense = dense(x)
        # runtimes join a convolution and its activation, if nothing else reads what is between;
        # the result lies between the bounds where x does
        late = bits is None and is_exportable() and slopes.slope == 0.0
        if bits is None and not late:
            bits = slopes.pack(x_dense)
        if inplace:
            ctx.mark_dirty(x)
        y = slopes.evaluate(x, inplace)
        ctx.save_for_backward(slopes.pack(y) if late else bits)
        ctx.size, ctx.stride, ctx.slopes = x.size(), x_dense.stride(), slopes
        return x if inplace else y  # the argument itself, as torch.compile needs it

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (bits,) = ctx.saved_tensors
        return ctx.slopes.gradient(grad, bits, ctx.size, ctx.stride), None, None, None


def piecewise_linear(x: Tensor, slopes: Slopes = RELU, inplace: bool = False) -> Tensor:
    """ReLU, ReLU6, Hardtanh or leaky ReLU.

    Args:
        x: Any shape.
        slopes: The function; ReLU by default.
        inplace: Write the result into `x`.

    Returns:
        The activation of `x`, same shape. Keeps 1 bit an element if a gradient is needed.
    """
    bits = recorded(lambda: slopes.pack(dense(x)))
    if not (torch.is_grad_enabled() and x.requires_grad):
        return slopes.evaluate(x, inplace)
    result: Tensor = _PiecewiseLinear.apply(x, slopes, inplace, bits)
    return result


_SIXTH = torch.tensor(1.0 / 6.0, dtype=torch.float32).item()  # float32 in every type, as in PyTorch


class _HardSigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: Tensor | None) -> Tensor:
        x_dense = dense(x)
        ctx.save_for_backward(pack_between(x_dense, -3.0, 3.0) if bits is None else bits)
        ctx.size, ctx.stride = x.size(), x_dense.stride()
        return F.hardsigmoid(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (bits,) = ctx.saved_tensors
        slopes = unpack(bits, ctx.size, ctx.stride).to(grad.dtype)
        return slopes.mul_(grad).mul_(_SIXTH), None


def hard_sigmoid(x: Tensor) -> Tensor:
    """``relu6(x + 3) / 6``; keeps 1 bit an element if a gradient is needed.

    Args:
        x: Any shape.
    """
    bits = recorded(lambda: pack_between(dense(x), -3.0, 3.0))
    if not (torch.is_grad_enabled() and x.requires_grad):
        return F.hardsigmoid(x)
    result: Tensor = _HardSigmoid.apply(x, bits)
    return result
