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


def answer_as_(layer: nn.Module, original: nn.Module) -> None:
    """Let what takes a layer's place answer what code asks of that layer: `stride`, `weight.dtype`.

    What it does not have itself it gets: public attributes, and parameters as tensors that neither
    train nor are part of its state.

    Args:
        layer: What takes its place; edited in place.
        original: The user's layer.
    """
    for name, value in vars(original).items():
        if not name.startswith("_") and not hasattr(layer, name):
            setattr(layer, name, value)
    for name, parameter in original.named_parameters(recurse=False):
        if not hasattr(layer, name):
            layer.register_buffer(name, parameter.detach(), persistent=False)


def numbers(value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    """One int an axis from what PyTorch's layers take: an int or one for every axis."""
    return (value,) * axes if isinstance(value, int) else tuple(value)
