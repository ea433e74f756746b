"""DA3Callback: one line in a Trainer. Hooks of a few lines that call the core."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch._C._autograd import _profiler_enabled
from typing_extensions import override

from lightning_da3.attaching import attach_
from lightning_da3.config import DA3Config
from lightning_da3.domains import DA3Model
from lightning_da3.errors import CheckpointError, DA3Error
from lightning_da3.memory import PeakBytes, SavedActivations
from lightning_da3.state import domain_state


class DA3Callback(L.Callback):
    """Learn one domain with the network inside any LightningModule.

    Before the optimizers are made, the network is converted (once, in place of the original) and
    the domain is added or selected. Only the domain's parameters train; Lightning's checkpoints
    hold the domains alone. The LightningModule needs no change.

    Logged, with every logger of the Trainer:

    * ``da3/saved_activation_bytes``: kept for the backward pass after the first forward pass.
    * ``da3/peak_bytes``: peak of the second training step above its start (1 process, CPU or CUDA).
    * ``da3/executed_flops_fraction``: share of the hosts' FLOPs that the gates let run, by epoch.

    Args:
        domain: Its name.
        num_classes: Of the domain; needed when it is new.
        config: For the conversion; the same for every domain of one network.
        backbone: Name of the network inside the LightningModule, such as ``"net"``; by default the
            one child that has convolutions.
        save_dir: Folder in which ``<domain>.safetensors`` is kept up to date after every epoch.
    """

    def __init__(
        self,
        domain: str,
        num_classes: int | None = None,
        config: DA3Config | None = None,
        backbone: str | None = None,
        save_dir: str | None = None,
    ) -> None:
        super().__init__()
        self.domain = domain
        self.num_classes = num_classes
        self.config = config or DA3Config()
        self.backbone = backbone
        self.save_dir = save_dir
        self.model: DA3Model | None = None
        self._watching: SavedActivations | PeakBytes | None = None
        self._batches_measured = 0

    @property
    @override
    def state_key(self) -> str:
        return f"{type(self).__name__}[{self.domain}]"

    @property
    def path(self) -> Path | None:
        """Where the domain is saved, or None without `save_dir`."""
        return None if self.save_dir is None else Path(self.save_dir) / f"{self.domain}.safetensors"

    # --- conversion -------------------------------------------------------------------------------

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        trainer.strategy.lightning_module_state_dict = partial(domain_state, pl_module)  # type: ignore[method-assign]
        if _builds_later(pl_module):
            pl_module.configure_model = _Then(pl_module, self._attach)  # type: ignore[method-assign]
        else:
            self._attach(pl_module)

    def _attach(self, pl_module: L.LightningModule) -> None:
        self.model = attach_(pl_module, self.backbone, self.config, self.domain, self.num_classes)

    # --- training ---------------------------------------------------------------------------------

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self.model is not None
        self.model.train()  # Lightning leaves a module in eval that came in eval
        self.model.gate_loss_scale = 1.0 / trainer.accumulate_grad_batches
        self._batches_measured = 0

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert self.model is not None
        self.model.set_progress(_progress(trainer))
        if self._batches_measured == 0:
            self._watching = SavedActivations(pl_module, inputs=batch).__enter__()
        elif self._batches_measured == 1 and _can_measure_peak(pl_module.device):
            # the second step is the first with optimizer state
            self._watching = PeakBytes(pl_module.device).__enter__()
        self._batches_measured += 1

    @override
    def on_before_backward(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor
    ) -> None:
        if isinstance(self._watching, SavedActivations):
            self._log_watched(pl_module, "da3/saved_activation_bytes")
        if not torch.isfinite(loss):
            raise DA3Error(self._not_finite(loss))

    @override
    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        assert self.model is not None
        if isinstance(self._watching, PeakBytes):
            self._log_watched(pl_module, "da3/peak_bytes")
        self._stop_watching()  # a step that never told Lightning of its backward
        fraction = self.model.executed_flops_fraction
        if fraction is not None:
            pl_module.log("da3/executed_flops_fraction", fraction, on_step=False, on_epoch=True)

    def _log_watched(self, pl_module: L.LightningModule, key: str) -> None:
        watching = self._stop_watching()
        assert watching is not None
        pl_module.log(key, float(watching.bytes), on_step=False, on_epoch=True)

    def _stop_watching(self) -> SavedActivations | PeakBytes | None:
        watching, self._watching = self._watching, None
        if watching is not None:
            watching.__exit__(None, None, None)
        return watching

    @override
    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._stop_watching()

    # --- files ------------------------------------------------------------------------------------

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._save(trainer)

    @rank_zero_only
    def _save(self, trainer: L.Trainer) -> None:
        assert self.model is not None
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"Cannot make the folder {str(self.path.parent)!r}: {error}."
            ) from error
        self.model.save_domain(self.domain, self.path, metrics=_finite(trainer.callback_metrics))

    def _not_finite(self, loss: Tensor) -> str:
        if self.path is None:
            kept = "No state was saved: give DA3Callback a `save_dir`."
        elif self.path.exists():
            kept = f"The last good state is {str(self.path)!r}."
        else:
            kept = "No epoch was finished yet, so no state was saved."
        return (
            f"The loss of domain {self.domain!r} is {loss.item()}; the step was not taken. {kept} "
            "Lower the learning rate, clip gradients (Trainer(gradient_clip_val=1.0)), or look "
            "for NaN in the data."
        )


class _Then:
    """A LightningModule's `configure_model` with something to do behind it; gone once it ran."""

    def __init__(self, pl_module: L.LightningModule, then: Callable[[Any], None]) -> None:
        self.pl_module, self.then = pl_module, then
        self.__code__ = None  # by which Lightning tells that the hook is overridden

    def __call__(self) -> None:
        del self.pl_module.configure_model  # the instance's own: what the class says is back
        self.pl_module.configure_model()
        self.then(self.pl_module)


def _builds_later(pl_module: L.LightningModule) -> bool:
    """Whether the network may be made, or made anew, after `Callback.setup`."""
    kind = type(pl_module)
    return (
        kind.setup is not L.LightningModule.setup
        or kind.configure_model is not L.LightningModule.configure_model
    )


def _can_measure_peak(device: torch.device) -> bool:
    """Known kinds of device, and on CPU no other profiler: only one can run at a time."""
    return device.type == "cuda" or (device.type == "cpu" and not _profiler_enabled())


def _progress(trainer: L.Trainer) -> float:
    total = trainer.estimated_stepping_batches
    return 1.0 if math.isinf(total) or total <= 0 else min(1.0, trainer.global_step / total)


def _finite(metrics: dict[str, Any]) -> dict[str, float]:
    values = {name: float(value) for name, value in metrics.items()}
    return {name: value for name, value in values.items() if math.isfinite(value)}
