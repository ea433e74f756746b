"""The figures that a run logs: bytes of its first steps, resident bytes, executed FLOPs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_da3.errors import PredictionWarning
from lightning_da3.memory import resident_bytes
from lightning_da3.model.model import DA3Model
from lightning_da3.trainer.first_steps import FirstSteps
from lightning_da3.trainer.lightning_private import is_compiled, profiler_runs


class Figures:
    """Measures the first steps of a fit, and logs what is known of them and of every other step.

    Args:
        predict: Whether to predict the peak of a step.

    Attributes:
        first_steps: What the first steps of the last fit took. None before one, and for a compiled
            LightningModule: the hooks would be compiled with its step, and gradients be lost.
    """

    def __init__(self, predict: bool) -> None:
        self.predict = predict
        self.first_steps: FirstSteps | None = None

    def start(self, trainer: L.Trainer, pl_module: L.LightningModule, model: DA3Model) -> None:
        """A training begins."""
        predict = self.predict and trainer.world_size == 1
        self.first_steps = None if is_compiled(pl_module) else FirstSteps(model, predict=predict)

    def step_begins(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> None:
        """A training step begins."""
        if self.first_steps is not None:
            device = pl_module.device
            peak_on = device if _can_measure_peak(trainer, device) else None
            self.first_steps.begin(pl_module, batch, peak_on=peak_on)

    def backward_begins(self, pl_module: L.LightningModule) -> None:
        """The backward pass of a training step comes next."""
        steps = self.first_steps
        if steps is not None and steps.forward_ended():
            _log(pl_module, "da3/saved_activation_bytes", steps.saved_activation_bytes)

    def step_ends(self, pl_module: L.LightningModule, model: DA3Model) -> None:
        """A training step is over."""
        steps = self.first_steps
        if steps is not None and steps.end():
            _log(pl_module, "da3/peak_bytes", steps.peak_bytes)
            if steps.predicted is not None:
                _log(pl_module, "da3/predicted_peak_bytes", steps.predicted.peak_bytes)
            if steps.surprising:
                rank_zero_warn(_surprised(steps), category=PredictionWarning)
        _log(pl_module, "da3/executed_flops_fraction", model.decided_flops_fraction)

    def epoch_ends(self, pl_module: L.LightningModule) -> None:
        """An epoch is over."""
        if pl_module.device.type == "cpu":
            _log(pl_module, "da3/resident_bytes", resident_bytes())

    def abort(self) -> None:
        """Training stops in the midst of a step."""
        if self.first_steps is not None:
            self.first_steps.abort()


def finite(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Metrics as plain numbers, without those that are infinite or not a number."""
    values = {name: float(value) for name, value in metrics.items()}
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _log(pl_module: L.LightningModule, key: str, value: float | Tensor | None) -> None:
    if value is not None:
        value = value if isinstance(value, Tensor) else float(value)
        pl_module.log(key, value, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)


def _can_measure_peak(trainer: L.Trainer, device: torch.device) -> bool:
    """Known kinds of device, and on CPU no other profiler: only one can run at a time."""
    if trainer.world_size > 1:
        return False
    return device.type == "cuda" or (device.type == "cpu" and not profiler_runs())


def _surprised(steps: FirstSteps) -> str:
    assert steps.predicted is not None and steps.peak_bytes is not None
    said, found = steps.predicted.peak_bytes / 2**20, steps.peak_bytes / 2**20
    return (
        f"A training step peaked at {found:.1f} MiB above its start; {said:.1f} MiB were predicted "
        "for the network. What `training_step` computes beside the network, its loss and the "
        "optimizer take memory as well: leave room for them where you choose a batch by the "
        "prediction. DA3Callback(predict=False) predicts nothing."
    )
