"""How the backward of every op runs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Backward = Callable[..., Any]


def once_differentiable(backward: Backward) -> Backward:
    """PyTorch's `once_differentiable`, and off autocast, whatever surrounds the backward pass.

    The types of its operands say what autocast did in the forward: what they are, results are. A
    backward inside `torch.autocast` must not lower some operands alone.
    """
    once = torch.autograd.function.once_differentiable(backward)

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> Any:
        grad = next((g for g in grads if g is not None), None)
        if grad is None or torch.compiler.is_compiling():
            return once(ctx, *grads)
        device = grad.device.type
        if not torch.is_autocast_enabled(device):
            return once(ctx, *grads)
        with torch.autocast(device, enabled=False):
            return once(ctx, *grads)

    return run
