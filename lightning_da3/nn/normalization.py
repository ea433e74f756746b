"""Batch norm in eval: folded into the convolution before it, or an affine map by channel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from lightning_da3.nn.frozen import frozen
from lightning_da3.ops.normalization import frozen_affine

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


class BatchNormStatistics(NamedTuple):
    """The tensors that batch norm in eval computes with, each (C,), and `eps`."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    @classmethod
    def of(cls, norm: BatchNorm) -> BatchNormStatistics:
        """The statistics of a batch norm that has running ones."""
        mean, var = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
        return cls(mean, var, norm.weight, norm.bias, norm.eps)

    @classmethod
    def read(cls, state: Mapping[str, Tensor], name: str, eps: float) -> BatchNormStatistics:
        """The statistics of the batch norm `name` in a state dict."""
        weight, bias = state.get(f"{name}.weight"), state.get(f"{name}.bias")
        return cls(state[f"{name}.running_mean"], state[f"{name}.running_var"], weight, bias, eps)

    def affine(self) -> tuple[Tensor, Tensor]:
        """Scale and shift (C,) in float64: ``bn(x) = x * scale + shift``."""
        scale = 1.0 / (self.var.double() + self.eps).sqrt()  # IEEE: the same on every device
        if self.weight is not None:
            scale = scale * self.weight.double()
        shift = -self.mean.double() * scale
        return scale.detach(), (shift if self.bias is None else shift + self.bias.double()).detach()


def fold(
    weight: Tensor, bias: Tensor | None, norm: BatchNormStatistics | None
) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one convolution that does ``norm(conv(x))``; computed in float64.

    Args:
        weight: (O, ..).
        bias: (O,) or None.
        norm: The statistics of the batch norm behind it, or None.

    Returns:
        float64 (O, ..) and (O,).
    """
    weight = weight.detach().double()
    shift = weight.new_zeros(len(weight)) if bias is None else bias.detach().double()
    if norm is None:
        return weight, shift
    scale, offset = norm.affine()
    return weight * scale.view(-1, *[1] * (weight.dim() - 1)), shift * scale + offset


class FrozenAffine(nn.Module):
    """A batch norm that could not be folded: ``y = x * scale + shift`` by channel.

    Args:
        norm: A batch norm with running statistics.
        inplace: The input may be overwritten.
        name: The batch norm's name in the user's network.
    """

    def __init__(self, norm: BatchNorm, inplace: bool = False, name: str = "") -> None:
        super().__init__()
        self.name, self.eps, self.inplace = name, norm.eps, inplace
        scale, shift = BatchNormStatistics.of(norm).affine()
        dtype = cast(Tensor, norm.running_mean).dtype
        self.scale, self.shift = frozen(scale.to(dtype)), frozen(shift.to(dtype))

    @property
    def weight(self) -> Tensor:
        """With the other three, a batch norm's tensors that give the same function."""
        return self.scale

    @property
    def bias(self) -> Tensor:
        """See `weight`."""
        return self.shift

    @property
    def running_mean(self) -> Tensor:
        """See `weight`."""
        return torch.zeros_like(self.scale)

    @property
    def running_var(self) -> Tensor:
        """See `weight`."""
        return torch.full_like(self.scale, 1.0 - self.eps)

    def translate(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This layer's own state from that of the user's network.

        Raises:
            KeyError: A tensor is missing.
        """
        scale, shift = BatchNormStatistics.read(state, self.name, self.eps).affine()
        return {"scale": scale, "shift": shift}

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *in) to the same shape."""
        return frozen_affine(x, self.scale, self.shift, self.inplace)
