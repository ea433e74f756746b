"""Activations that keep bits or 8-bit codes of their derivative, and sums."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_da3.nn.shared_codes import SharedCodes
from lightning_da3.ops.activated import ValueCode, activation_of_codes
from lightning_da3.ops.activation import Slopes, hard_sigmoid, piecewise_linear
from lightning_da3.ops.adapter import KeptInput
from lightning_da3.ops.smooth import Smooth, quantized_grad_activation


class PiecewiseLinear(nn.Module):
    """ReLU, ReLU6, Hardtanh or leaky ReLU that keeps one bit an element.

    Args:
        slopes: The function.
        inplace: The input may be overwritten.
    """

    def __init__(self, slopes: Slopes, inplace: bool) -> None:
        super().__init__()
        self.slopes, self.inplace = slopes, inplace

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same shape."""
        return piecewise_linear(x, self.slopes, self.inplace)

    def extra_repr(self) -> str:
        """The parameters."""
        return f"{self.slopes}, inplace={self.inplace}"


class Sum(nn.Module):
    """``x + y``, in the memory of x.

    Args:
        inplace: The first input may be overwritten.
    """

    def __init__(self, inplace: bool = True) -> None:
        super().__init__()
        self.inplace = inplace

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Two tensors of a shape to that shape; others broadcast into a new tensor."""
        if self.inplace and x.shape == y.shape and x.dtype == y.dtype:
            return x.add_(y)
        return x + y


class HardSigmoid(nn.Module):
    """``relu6(x + 3) / 6`` that keeps one bit an element."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same shape."""
        return hard_sigmoid(x)


class QuantizedGradActivation(nn.Module):
    """A smooth activation that keeps a code of its derivative.

    Args:
        smooth: The activation.
        inplace: The input may be overwritten.
    """

    def __init__(self, smooth: Smooth, inplace: bool) -> None:
        super().__init__()
        self.smooth, self.inplace = smooth, inplace

    def forward(self, x: Tensor, *, shared: SharedCodes | None = None) -> Tensor:
        """Any shape to the same shape.

        Args:
            x: Any shape.
            shared: Where to put codes of `x`, which then are all that is kept; None: codes of the
                derivative are kept.
        """
        if shared is None or not (torch.is_grad_enabled() and x.requires_grad):
            return quantized_grad_activation(x, self.smooth, self.inplace)
        codes, how = ValueCode.encode(x, self.smooth)
        y = activation_of_codes(x, codes, how, self.inplace)
        shared.put(y, KeptInput(codes, how))
        return y

    def extra_repr(self) -> str:
        """The parameters."""
        return f"{self.smooth.name}, inplace={self.inplace}"
