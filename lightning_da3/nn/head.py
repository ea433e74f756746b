"""The classifier: the backbone's own and one for every domain."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

Head = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


def new_head(original: Head, num_classes: int, device: torch.device) -> Head:
    """A fresh classifier that reads what `original` reads and gives `num_classes` scores."""
    place: dict[str, Any] = {"device": device, "dtype": original.weight.dtype}
    has_bias = original.bias is not None
    if isinstance(original, nn.Linear):
        return nn.Linear(original.in_features, num_classes, bias=has_bias, **place)
    return type(original)(
        original.in_channels,
        num_classes,
        original.kernel_size,  # type: ignore[arg-type]
        original.stride,  # type: ignore[arg-type]
        original.padding,  # type: ignore[arg-type]
        original.dilation,  # type: ignore[arg-type]
        bias=has_bias,
        padding_mode=original.padding_mode,
        **place,
    )


class HeadSlot(nn.Module):
    """Where the classifier goes: the active domain's, or the backbone's own.

    Args:
        original: The backbone's classifier; frozen.
    """

    active: nn.Module | None

    def __init__(self, original: Head) -> None:
        super().__init__()
        self.original = original
        self.set_active(None)

    def set_active(self, head: nn.Module | None) -> None:
        """Refer to `head` without owning it; None is the backbone's own."""
        object.__setattr__(self, "active", head)

    def forward(self, x: Tensor) -> Tensor:
        """Features to scores."""
        head = self.original if self.active is None else self.active
        return cast(Tensor, head(x))
