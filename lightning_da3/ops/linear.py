"""Products with frozen matrices.

Shapes: x (.., K), matrix (O, K), y (.., O). Kept: nothing but the matrix, which lives in the model.
PyTorch's own product keeps no more, but its BLAS may be half as fast as oneDNN, which computes the
convolutions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_HAS_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


def is_fast(x: Tensor, matrix: Tensor) -> bool:
    """Whether oneDNN's matrix product serves."""
    return bool(
        _HAS_ONEDNN
        and x.dtype == matrix.dtype == torch.float32
        and x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and torch.backends.mkldnn.enabled
        and x.numel() > 0
    )


def product(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x matrix^T + bias`` without a graph, for what `is_fast` says so of."""
    return torch.ops.mkldnn._linear_pointwise(x, matrix, bias, "none", [], "")  # type: ignore[no-any-return]


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return product(grad, weight.t()), None, None


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias`` whose weight and bias get no gradient; keeps nothing.

    Args:
        x: (.., K).
        weight: (O, K).
        bias: (O,) or None.

    Returns:
        (.., O).
    """
    if not is_fast(x, weight) or torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight, bias)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return product(x, weight, bias)
    result: Tensor = _FrozenLinear.apply(x, weight, bias)
    return result
