"""The classifier: the backbone's own and one for every domain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_da3.errors import InputError
from lightning_da3.nn.call import Place
from lightning_da3.ops.trained_convolution import trained_conv

FRESH = 0.1  # of PyTorch's own scale: what is random in a head is what adapters have to undo

Head = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


class _Coded(nn.Module):
    """A classifier of positions that keeps 8-bit codes of its features while it trains."""

    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    padding_mode: Any

    def forward(self, x: Tensor) -> Tensor:
        """Features to scores."""
        trains = torch.is_grad_enabled() and self.weight.requires_grad
        if not trains or self.padding_mode != "zeros" or isinstance(self.padding, str):
            return cast(Tensor, super().forward(x))
        return trained_conv(x, self.weight, self.bias, self.stride, self.padding, self.dilation)


class CodedConv1d(_Coded, nn.Conv1d):
    """`nn.Conv1d` that keeps codes."""


class CodedConv2d(_Coded, nn.Conv2d):
    """`nn.Conv2d` that keeps codes."""


class CodedConv3d(_Coded, nn.Conv3d):
    """`nn.Conv3d` that keeps codes."""


_CODED = {nn.Conv1d: CodedConv1d, nn.Conv2d: CodedConv2d, nn.Conv3d: CodedConv3d}


def new_head(original: Head, num_classes: int, device: torch.device, *, exact: bool) -> Head:
    """A fresh classifier that reads what `original` reads and gives `num_classes` scores.

    Args:
        original: The backbone's own.
        num_classes: How many scores.
        device: Where it computes.
        exact: What a convolution keeps is no codes.
    """
    place: dict[str, Any] = {"device": device, "dtype": original.weight.dtype}
    has_bias = original.bias is not None
    if isinstance(original, nn.Linear):
        return _small(nn.Linear(original.in_features, num_classes, bias=has_bias, **place))
    kind: Any = type(original) if exact else _CODED.get(type(original), type(original))
    made: Head = kind(
        original.in_channels,
        num_classes,
        original.kernel_size,
        original.stride,
        original.padding,
        original.dilation,
        bias=has_bias,
        padding_mode=original.padding_mode,
        **place,
    )
    return _small(made)


def _small(head: Head) -> Head:
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(FRESH)
    return head


def classes_of(head: nn.Module) -> int:
    """How many scores a head gives."""
    return cast(Head, head).weight.shape[0]


def class_axis(head: nn.Module) -> int:
    """The axis of the scores in a head's output."""
    return -1 if isinstance(head, nn.Linear) else 1


class MixedHeads(nn.Module):
    """Stands for the heads of several domains, one of which reads each sample of a batch.

    All scores are one tensor, as wide as the widest head's. Missing ones are far below any score,
    so that a softmax behind the heads is every domain's own; they are finite, as an interpolation
    behind the heads may multiply them by zero. Whoever separates the samples removes them.

    Args:
        heads: At least one.
        samples: Positions in the batch, for every head; together all of it.
    """

    def __init__(self, heads: Sequence[nn.Module], samples: Sequence[Tensor]) -> None:
        super().__init__()
        self.heads, self.samples = nn.ModuleList(heads), samples

    def forward(self, x: Tensor) -> Tensor:
        """Features to scores."""
        count = sum(map(len, self.samples))
        if len(x) != count:
            raise InputError(
                f"`domains` names {count} samples, but the head reads {len(x)} at once: they "
                "cannot be told apart there. Call the network for one domain at a time: "
                "`set_domain(name)`."
            )
        axis, longest = class_axis(self.heads[0]), max(map(classes_of, self.heads))
        whole: Tensor | None = None
        for head, own in zip(self.heads, self.samples, strict=True):
            scores = head(x.index_select(0, own))
            if whole is None:
                shape = [count, *scores.shape[1:]]
                shape[axis] = longest
                whole = scores.new_full(shape, torch.finfo(scores.dtype).min / 8)
            whole.narrow(axis, 0, scores.shape[axis]).index_copy_(0, own, scores)
        assert whole is not None
        return whole


class HeadSlot(Place):
    """Where the classifier goes: that of the call that runs, or the backbone's own.

    Args:
        original: The backbone's classifier; frozen.
    """

    def __init__(self, original: Head) -> None:
        super().__init__()
        self.original = original

    @property
    def active(self) -> nn.Module | None:
        """The head of the call that runs; None is the backbone's own."""
        return self.calls.now.head

    def forward(self, x: Tensor) -> Tensor:
        """Features to scores."""
        active = self.active
        head = self.original if active is None else active
        if isinstance(head, nn.Linear):
            x = x.contiguous()  # a class token is a view: all tokens would be kept
        return cast(Tensor, head(x))
