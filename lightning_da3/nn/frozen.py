"""What the backbone's frozen layers share: their weights never train, and nothing is updated.

Each module is a leaf of the graph around one op of `lightning_da3.ops`, so that tracing a converted
network again keeps the custom backward.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


def frozen(tensor: Tensor) -> nn.Parameter:
    """A parameter that never trains."""
    return nn.Parameter(tensor.detach(), requires_grad=False)


def numbers(value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    """One int an axis from what PyTorch's layers take: an int or one for every axis."""
    return (value,) * axes if isinstance(value, int) else tuple(value)
