"""A smooth activation that keeps codes of its input, from which its value follows as well.

Shapes: x, y: any. Kept: asinh(x) in 8 bits (1/4 of float32; see `lightning_da3.ops.codes`), in the
place of f'(x): whoever needs y in the backward then keeps nothing of it. The value is exact. Codes
of asinh(x) are fine around 0, where f' turns, and further out off by a fraction of x: whatever the
range of x, f' is about as precise as a code of its own would have it, and y as its own codes. Not
for functions whose derivative jumps: an element could come back on the other side.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_da3.ops.backward import once_differentiable
from lightning_da3.ops.codes import Code
from lightning_da3.ops.smooth import Smooth, widened

MOST_BEND = 1.0  # of f': beyond, or where it jumps, its own codes are far more precise


class ValueCode(NamedTuple):
    """How codes of an activation's input are made, and its value of them.

    Attributes:
        code: How asinh(x) is coded.
        smooth: The activation.
        dtype: The type of x.
    """

    code: Code
    smooth: Smooth
    dtype: torch.dtype

    @classmethod
    def encode(cls, x: Tensor, smooth: Smooth) -> tuple[Tensor, ValueCode]:
        """Codes of `x`, and how to read them."""
        u = torch.asinh(widened(x.detach()))
        code = Code.of(u)
        return code.encode(u), cls(code, smooth, x.dtype)

    def input(self, codes: Tensor) -> Tensor:
        """x, in float32 at least."""
        return torch.sinh(self.code.decode(codes))

    def decode(self, codes: Tensor) -> Tensor:
        """``y = f(x)``, in the type of x."""
        return self.smooth.value(self.input(codes)).to(self.dtype)


def gives_value(smooth: Smooth) -> bool:
    """Whether the derivative, too, may be computed from codes of the input."""
    return smooth.bend <= MOST_BEND


class _Activated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, how: ValueCode, inplace: bool) -> Tensor:
        ctx.how = how
        ctx.save_for_backward(codes)
        y = how.smooth.evaluate(x, inplace)
        if not inplace:
            return y
        ctx.mark_dirty(x)
        return x  # the argument itself, as torch.compile needs it

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (codes,) = ctx.saved_tensors
        smooth, x = ctx.how.smooth, ctx.how.input(codes)
        slopes = smooth.derivative(x, smooth.value(x) if smooth.reads_value else x)
        return slopes.mul_(grad).to(ctx.how.dtype), None, None, None


def activation_of_codes(x: Tensor, codes: Tensor, how: ValueCode, inplace: bool = False) -> Tensor:
    """The activation of `x`, exact; its gradient is computed from codes of `x`.

    Args:
        x: Any shape, of a floating type; needs a gradient.
        codes: Codes of `x`, which others may keep as well.
        how: How they were made.
        inplace: Write the result into `x`.

    Returns:
        Same shape and type. Keeps `codes`.
    """
    result: Tensor = _Activated.apply(x, codes, how, inplace)
    return result
