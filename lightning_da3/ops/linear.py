"""Products with frozen matrices; those stored in bfloat16 are copied for one use at a time.

Shapes: x (.., K), weight (O, K), y (.., O). Kept: nothing but the weight, which lives in the model.
PyTorch's own product keeps no more of a weight that is not copied, but its BLAS may be half as fast
as oneDNN, which computes the convolutions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_da3.ops.backward import once_differentiable
from lightning_da3.ops.exportable import is_exportable
from lightning_da3.torch_private.kernels import LINEAR_POINTWISE

_HAS_ONEDNN: bool = (
    LINEAR_POINTWISE is not None and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
)


def is_fast(x: Tensor, matrix: Tensor) -> bool:
    """Whether oneDNN's matrix product can be used, which computes in the type of both."""
    return bool(
        _HAS_ONEDNN
        and x.dtype == matrix.dtype == torch.float32
        and x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not is_exportable()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.enabled
        and x.numel() > 0
    )


def product(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x matrix^T + bias`` without a graph, where `is_fast` is true."""
    return LINEAR_POINTWISE(x, matrix, bias, "none", [], "")  # type: ignore[no-any-return]


def plain_linear(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """``x matrix^T + bias`` of PyTorch, which is quicker to call than oneDNN, and has a graph."""
    return F.linear(x, cast_weight(matrix, x), bias)


def cast_weight(weight: Tensor, x: Tensor) -> Tensor:
    """A weight in the type of `x`: one stored in bfloat16 is copied, others are not.

    Args:
        weight: Frozen, of any shape.
        x: What it is multiplied with.
    """
    return weight.to(x.dtype) if weight.dtype == torch.bfloat16 else weight


def cast_weight_backward(weight: Tensor, grad: Tensor) -> Tensor:
    """A weight in the type of the gradient that it is multiplied with in a backward.

    Args:
        weight: Frozen, of any shape.
        grad: The gradient; autocast may have lowered the output alone.
    """
    if torch.compiler.is_compiling() and weight.dtype != grad.dtype:
        weight = weight.clone()  # or the forward's copy would count as this one, and be kept
    return weight.to(grad.dtype)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.dtype = x.dtype
        y = _linear(x, weight, bias)
        # oneDNN's is a view, into which no Python that reads it might write
        return y if torch.compiler.is_compiling() else y.data

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        weight = cast_weight_backward(weight, grad)
        grad_x = product(grad, weight.t()) if is_fast(grad, weight) else grad @ weight
        return grad_x.to(ctx.dtype), None, None


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    weight = cast_weight(weight, x)
    if is_fast(x, weight):
        return product(x, weight, bias)
    return F.linear(x, weight, bias)


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias`` whose weight and bias get no gradient; keeps nothing.

    Args:
        x: (.., K).
        weight: (O, K), maybe stored in bfloat16.
        bias: (O,) or None.

    Returns:
        (.., O), of the type of `x`.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return _linear(x, weight, bias)
    if x.dtype == weight.dtype and not is_fast(x, weight):
        return F.linear(x, weight, bias)
    result: Tensor = _FrozenLinear.apply(x, weight, bias)
    return result
