"""PyTorch's linear layers and attention, frozen: the same parameters, quicker products.

Shapes: see `torch.nn.Linear` and `torch.nn.MultiheadAttention`, whose places they take.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_da3.nn.frozen import frozen
from lightning_da3.ops.linear import frozen_linear


class FrozenLinear(nn.Linear):
    """A frozen linear layer that keeps nothing for the backward. Its weight may be in bfloat16."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # the name it has in PyTorch
        """(.., K) to (.., O)."""
        return frozen_linear(input, self.weight, self.bias)


class FrozenAttention(nn.MultiheadAttention):
    """A frozen attention, quicker where a sequence attends to itself and weights are not asked for.

    Called otherwise, it is PyTorch's own, and its weights must not be stored in bfloat16.
    """

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """See `torch.nn.MultiheadAttention`."""
        alone = query is key is value and query.dim() == 3
        if not (alone and not args and _asks_nothing(**kwargs) and attends_plainly(self)):
            return super().forward(query, key, value, *args, **kwargs)
        x = query if self.batch_first else query.transpose(0, 1)
        both = frozen_linear(x, self.in_proj_weight, self.in_proj_bias)  # (B, T, 3 D)
        heads = both.view(*both.shape[:-1], 3, self.num_heads, self.head_dim)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each (B, heads, T, D / heads)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        y = frozen_linear(attended, self.out_proj.weight, self.out_proj.bias)
        return (y if self.batch_first else y.transpose(0, 1)), None


def _asks_nothing(
    need_weights: bool = True, average_attn_weights: bool = True, **masks: Any
) -> bool:
    del average_attn_weights
    return not need_weights and all(mask is None or mask is False for mask in masks.values())


def attends_plainly(layer: nn.Module) -> bool:
    """Whether it is an attention whose queries, keys and values have one width, and no extras."""
    return (
        isinstance(layer, nn.MultiheadAttention)
        and layer.in_proj_weight is not None
        and layer.bias_k is None
        and not layer.add_zero_attn
    )


FROZEN = {nn.Linear: FrozenLinear, nn.MultiheadAttention: FrozenAttention}


def freeze_layers_(network: nn.Module, without: Container[nn.Module] = ()) -> None:
    """Let every linear layer and attention of exactly PyTorch's own types be its frozen twin.

    Args:
        network: Edited in place; its parameters and their names stay.
        without: Modules that stay what they are.
    """
    for module in network.modules():
        if type(module) in FROZEN and module not in without:
            module.__class__ = cast(Any, FROZEN[type(module)])


def store_weights_of_(layer: nn.Module, dtype: torch.dtype) -> None:
    """Store the weights of a linear layer or an attention in `dtype`; biases stay as they are."""
    for module in layer.modules():
        for name in ("weight", "in_proj_weight"):
            if getattr(module, name, None) is not None:
                setattr(module, name, frozen(getattr(module, name).to(dtype)))
