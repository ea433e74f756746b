"""A recompute region of the graph as one module that keeps next to nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_da3.nn.activation import HardSigmoid, PiecewiseLinear, QuantizedGradActivation
from lightning_da3.nn.adapter import HostInput
from lightning_da3.nn.convolution import FrozenConv
from lightning_da3.nn.head import HeadSlot
from lightning_da3.ops.excitation import Branch, excited
from lightning_da3.ops.linear import plain_linear
from lightning_da3.ops.recomputed import activated, recomputed
from lightning_da3.torch_private.trees import tree_leaves


class Shortcut(Protocol):
    """A region in fewer operations."""

    def __call__(self, x: Tensor, /, *, exact: bool, codes: Tensor | None) -> Tensor:
        """What the region returns for its first input alone."""


class ActivatedConv(NamedTuple):
    """``silu(conv(x))``."""

    conv: FrozenConv
    activation: QuantizedGradActivation

    def __call__(self, x: Tensor, /, *, exact: bool, codes: Tensor | None) -> Tensor:
        """See `activated`."""
        return activated(x, self.conv, self.activation, exact=exact, codes=codes)


Small = QuantizedGradActivation | PiecewiseLinear | HardSigmoid


class Excitation(NamedTuple):
    """``v * s(mean(v))`` of ``v = silu(x)`` or x.

    Attributes:
        activation: The layer that computes v, if any.
        first: The first layer of s, pointwise.
        rest: The other layers of s.
    """

    activation: QuantizedGradActivation | None
    first: FrozenConv
    rest: tuple[FrozenConv | Small, ...]

    def __call__(self, x: Tensor, /, *, exact: bool, codes: Tensor | None) -> Tensor:
        """See `excited`."""
        branch = Branch(self.first.weight.flatten(1), self.first.bias, self._rest)
        return excited(x, self.activation, branch, exact=exact, codes=codes)

    def _rest(self, x: Tensor) -> Tensor:
        for layer in self.rest:
            x = _by_pytorch(layer, x)
        return x


def _by_pytorch(layer: FrozenConv | Small, x: Tensor) -> Tensor:
    """A layer's output for x (N, C), by PyTorch's operations alone."""
    if isinstance(layer, FrozenConv):
        return plain_linear(x, layer.weight.flatten(1), layer.bias)
    if isinstance(layer, PiecewiseLinear):
        return layer.slopes.evaluate(x, inplace=False)
    return F.hardsigmoid(x) if isinstance(layer, HardSigmoid) else layer.smooth.value(x)


class Recomputed(nn.Module):
    """Runs a region of the network again in the backward instead of keeping what it needs.

    Refers to the region without owning it: its layers stay where the user's network has them.

    Args:
        piece: The region, which maps one activation and constants to a tuple.
        exact: Keep the activation, not its 8-bit codes.
        shortcut: The region in fewer operations, if there is such a form.
        frozen: Positions among its arguments of features that need no gradient.

    Attributes:
        kept: Run the region once, and let its operations keep what they keep by themselves.
    """

    piece: nn.Module

    def __init__(
        self,
        piece: nn.Module,
        exact: bool,
        shortcut: Shortcut | None = None,
        frozen: Sequence[int] = (),
    ) -> None:
        super().__init__()
        object.__setattr__(self, "piece", piece)
        self.exact, self.frozen = exact, tuple(frozen)
        self.slots = [m for m in piece.modules() if isinstance(m, HostInput | HeadSlot)]
        self.shortcut, self.kept = shortcut, False

    def __getstate__(self) -> dict[str, Any]:
        """Copies and files keep the least: what is kept is decided for one model on one machine."""
        return {**vars(self), "kept": False}

    def forward(self, x: Any, *rest: Any, codes: Tensor | None = None) -> tuple[Any, ...]:
        """What the region returns; `codes` are those of x, if a host's input has made them."""
        if self.kept or not (isinstance(x, Tensor) and all(map(_is_plain, rest))):
            return cast(tuple[Any, ...], self.piece(x, *rest))  # a list of tensors, say
        if self.shortcut is not None and not torch.compiler.is_compiling():
            return (self.shortcut(x, exact=self.exact, codes=codes),)
        active = [m.active for m in self.slots if m.active is not None]
        piece: Callable[..., Any] = self.piece
        if active and not torch.compiler.is_compiling():
            piece = self.slots[0].calls.bound(piece)  # another may run when it is computed again
        return recomputed(
            piece,
            x,
            *rest,
            exact=self.exact,
            uses=active,
            codes=None if self.exact else codes,
            frozen=self.frozen,
        )


def _is_plain(value: Any) -> bool:
    """Whether `value` is a tensor, or no tensor hides in it."""
    return isinstance(value, Tensor) or not any(isinstance(t, Tensor) for t in tree_leaves(value))
