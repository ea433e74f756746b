"""Callbacks that average weights, EMA and SWA: they average the domains and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_da3.model.model import DA3Model
from lightning_da3.model.state import without_backbones
from lightning_da3.trainer.lightning_private import averaged_model, is_of_lightning

AVERAGING_CALLBACKS = ("WeightAveraging", "StochasticWeightAveraging")


def copy_again(trainer: Any, pl_module: Any) -> None:
    """Let callbacks that hold a copy of the LightningModule take it anew, after the conversion."""
    for callback in _averaging(trainer):
        callback.setup(trainer, pl_module, trainer.state.fn)


def average_domains_only(trainer: Any) -> list[DA3Model]:
    """Leave frozen weights as they are, to the last bit, and backbones out of checkpoints.

    Returns:
        The networks in the averages.
    """
    copies: list[DA3Model] = []
    for callback in _averaging(trainer):
        average = averaged_model(callback)
        mean = getattr(average, "avg_fn", None)
        if mean is not None and not isinstance(mean, _Mean):
            average.avg_fn = _Mean(mean)
            average.register_state_dict_post_hook(_leave_out_backbones)
        if average is not None:
            copies += [module for module in average.modules() if isinstance(module, DA3Model)]
    return copies


def _averaging(trainer: Any) -> list[Any]:
    return [
        callback
        for callback in trainer.callbacks
        if any(is_of_lightning(callback, kind) for kind in AVERAGING_CALLBACKS)
    ]


def _leave_out_backbones(module: nn.Module, state: dict[str, Any], *_: object) -> None:
    kept = without_backbones(state, module)
    for key in [key for key in state if key not in kept]:
        del state[key]


class _Mean:
    """A mean of two numbers, which is that number exactly where they are equal: frozen weights."""

    def __init__(self, mean: Callable[..., Tensor]) -> None:
        self.mean = mean

    def __call__(self, average: Tensor, current: Tensor, *args: Any) -> Tensor:
        return torch.where(average == current, average, self.mean(average, current, *args))
