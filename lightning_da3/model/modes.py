"""Layers that compute differently in train mode, which the backbone must not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lightning_da3.layers import has_modes
from lightning_da3.planning.plan import Plan


@contextmanager
def in_use(module: nn.Module) -> Iterator[None]:
    """Inference in the block; afterwards every module is in the mode that it was in."""
    modes = {layer: layer.training for layer in module.modules()}
    try:
        with torch.no_grad():
            module.eval()
            yield
    finally:
        for layer, mode in modes.items():
            layer.training = mode


def hold_in_eval_(backbone: nn.Module) -> None:
    """Put layers in eval that could compute differently in train mode; the others stay."""
    for layer in backbone.modules():
        if has_modes(layer):
            layer.eval()


def set_mode_(backbone: nn.Module, plan: Plan, mode: bool) -> None:
    """Let a rewritten network show `mode`, where that changes nothing but what stays Python."""
    for layer in backbone.modules():
        layer.training = mode
    hold_in_eval_(backbone)
    for path, _ in plan.python:
        module = backbone.get_submodule(path)
        if not type(module).__module__.startswith("torch.nn."):
            module.training = mode
