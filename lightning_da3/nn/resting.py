"""Layers whose weights rest in bfloat16, and are copied to the activations' type for each use.

The names of their tensors are those of the layers that they stand in for, so that states load.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_da3.nn.frozen import frozen
from lightning_da3.ops.resting import resting_linear


class RestingLinear(nn.Module):
    """A frozen linear layer.

    Args:
        layer: The layer; its weight is copied.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight = frozen(layer.weight.to(torch.bfloat16))
        self.bias = None if layer.bias is None else frozen(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(.., C) to (.., O)."""
        return resting_linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Shapes, as PyTorch's own layer prints them."""
        out_features, in_features = self.weight.shape
        return f"in_features={in_features}, out_features={out_features}, {self.weight.dtype}"


class RestingAttention(nn.Module):
    """A frozen self-attention without masks.

    Args:
        layer: The layer, one that `can_rest`; its weights are copied.
    """

    def __init__(self, layer: nn.MultiheadAttention) -> None:
        super().__init__()
        assert layer.in_proj_weight is not None
        self.heads, self.batch_first = layer.num_heads, layer.batch_first
        self.in_proj_weight = frozen(layer.in_proj_weight.to(torch.bfloat16))
        self.in_proj_bias = None if layer.in_proj_bias is None else frozen(layer.in_proj_bias)
        self.out_proj = RestingLinear(layer.out_proj)

    @staticmethod
    def can_rest(layer: nn.Module) -> bool:
        """Whether this stands in for `layer`."""
        return (
            type(layer) is nn.MultiheadAttention
            and layer.in_proj_weight is not None  # queries, keys and values of one width
            and layer.bias_k is None
            and not layer.add_zero_attn
        )

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """(N, T, D) or (T, N, D) to the same shape, and None for the weights."""
        x = x if self.batch_first else x.transpose(0, 1)
        qkv = resting_linear(x, self.in_proj_weight, self.in_proj_bias)
        heads = qkv.view(*qkv.shape[:-1], 3, self.heads, -1)  # (N, T, 3, H, D/H)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each (N, H, T, D/H)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2)
        y = self.out_proj(mixed)
        return (y if self.batch_first else y.transpose(0, 1)), None
