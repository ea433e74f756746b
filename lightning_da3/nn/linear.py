"""PyTorch's linear layers and attention, frozen: the same parameters, quicker products.

Shapes: see `torch.nn.Linear` and `torch.nn.MultiheadAttention`, whose places they take.
"""

from __future__ import annotations

from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_da3.ops.linear import frozen_linear, is_fast


class FrozenLinear(nn.Linear):
    """A frozen linear layer that keeps nothing for the backward."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # the name it has in PyTorch
        """(.., K) to (.., O)."""
        return frozen_linear(input, self.weight, self.bias)


class FrozenAttention(nn.MultiheadAttention):
    """A frozen attention, quicker where a sequence attends to itself and nobody asks how."""

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """As `torch.nn.MultiheadAttention`."""
        alone = query is key is value and query.dim() == 3
        plain = alone and not args and kwargs == {"need_weights": False}
        if not (plain and self._is_plain and is_fast(query, self.in_proj_weight)):
            return super().forward(query, key, value, *args, **kwargs)
        both = frozen_linear(query, self.in_proj_weight, self.in_proj_bias)  # (B, T, 3 D)
        heads = both.unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*heads.unbind(0))  # (B, heads, T, D / heads)
        joined = attended.transpose(1, 2).flatten(2)
        return frozen_linear(joined, self.out_proj.weight, self.out_proj.bias), None

    @property
    def _is_plain(self) -> bool:
        extended = self.bias_k is not None or self.add_zero_attn
        return self._qkv_same_embed_dim and self.batch_first and not extended


_FROZEN = {nn.Linear: FrozenLinear, nn.MultiheadAttention: FrozenAttention}


def freeze_linear_layers_(network: nn.Module) -> None:
    """Let every linear layer and attention of exactly PyTorch's own types be its frozen twin.

    Args:
        network: Edited in place; its parameters and their names stay.
    """
    for module in network.modules():
        if type(module) in _FROZEN:
            module.__class__ = cast(Any, _FROZEN[type(module)])
