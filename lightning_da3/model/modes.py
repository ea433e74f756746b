"""Layers that compute differently in train mode, which the backbone must not."""

from __future__ import annotations

from torch import nn

from lightning_da3.layers import has_modes


def hold_in_eval_(backbone: nn.Module) -> None:
    """Put layers in eval that could compute differently in train mode; the others stay."""
    for layer in backbone.modules():
        if has_modes(layer):
            layer.eval()
