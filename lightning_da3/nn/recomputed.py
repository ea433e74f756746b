"""A frozen piece of the graph as one module that keeps next to nothing."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_da3.nn.adapter import HostInput
from lightning_da3.nn.frozen import Coded, FrozenConv
from lightning_da3.nn.head import HeadSlot
from lightning_da3.ops.recomputed import activated, recomputed


class Recomputed(nn.Module):
    """Runs a piece of the network again in the backward instead of keeping what it needs.

    Refers to the piece without owning it: its layers stay where the user's network has them.

    Args:
        piece: From one activation and constants to a tuple.
        exact: Keep the activation, not its 8-bit codes.
        activated: The two layers of a piece that is ``silu(conv(x))`` and no more.

    Attributes:
        kept: Run the piece once, and let its operations keep what they keep by themselves.
    """

    piece: nn.Module

    def __init__(
        self, piece: nn.Module, exact: bool, activated: tuple[FrozenConv, Coded] | None = None
    ) -> None:
        super().__init__()
        object.__setattr__(self, "piece", piece)
        self.exact = exact
        self.doors = [m for m in piece.modules() if isinstance(m, HostInput | HeadSlot)]
        self.activated, self.kept = activated, False

    def __getstate__(self) -> dict[str, Any]:
        """Copies and files keep the least: what is kept is decided for one model on one machine."""
        return {**vars(self), "kept": False}

    def forward(self, x: Any, *rest: Any, codes: Tensor | None = None) -> tuple[Any, ...]:
        """What the piece returns; `codes` are those of x, where a host's input has made them."""
        if self.kept or not (isinstance(x, Tensor) and all(map(_is_plain, rest))):
            return cast(tuple[Any, ...], self.piece(x, *rest))  # a list of tensors, say
        if self.activated is not None and not torch.compiler.is_compiling():
            return (activated(x, *self.activated, exact=self.exact, codes=codes),)
        active = [m.active for m in self.doors if m.active is not None]
        return recomputed(
            self.piece,
            x,
            *rest,
            exact=self.exact,
            parameters=tuple(p for module in active for p in module.parameters()),
            random=any(getattr(m, "noisy", False) and m.training for m in active),
            codes=None if self.exact else codes,
        )


def _is_plain(value: Any) -> bool:
    """Whether `value` is a tensor, or no tensor hides in it."""
    return isinstance(value, Tensor) or not any(isinstance(t, Tensor) for t in tree_leaves(value))
