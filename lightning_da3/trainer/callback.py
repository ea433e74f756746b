"""DA3Callback: one line in a Trainer. Hooks of a few lines that call the core."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_da3.config import DA3Config
from lightning_da3.errors import CheckpointError, ConfigError, DA3Error, PredictionWarning
from lightning_da3.memory import resident_bytes
from lightning_da3.model.model import DA3Model
from lightning_da3.torch_private.profiling import is_profiling
from lightning_da3.trainer.first_steps import FirstSteps
from lightning_da3.trainer.refusals import builds_later, check_converted_before, starts_processes
from lightning_da3.trainer.session import TrainingSession, loss_scale, state_key


class DA3Callback(L.Callback):
    """Learn one domain, or several, with the network inside any LightningModule.

    Before the optimizers are made, the network is converted (once, in place of the original) and
    the domain is added or selected. Only the domain's parameters train; Lightning's checkpoints
    hold the domains alone. The LightningModule needs no change.

    Several domains in one run take turns, batch by batch: give their numbers of classes by name,
    and a `DomainLoader` of their loaders. Loaders to validate, test or predict with may be a dict
    by domain in any run; each is computed with its own.

    Logged, with every logger of the Trainer:

    * ``da3/saved_activation_bytes``: kept for the backward pass after the first forward pass; not
      of a LightningModule that `torch.compile` compiled.
    * ``da3/peak_bytes``: peak of the second training step above its start (1 process, CPU or CUDA).
    * ``da3/predicted_peak_bytes``: what that peak was predicted to be before the step, by running
      the network on tensors without values, with a loss of our own and plain SGD. Not where that
      cannot be known (`lightning_da3.trainer.first_steps`). A measured peak that is off by more
      than 20 %, and by more than 1 MiB, is a `PredictionWarning`: what `training_step` computes
      beside the network takes memory as well.
    * ``da3/resident_bytes``: largest resident set of the process so far, by epoch (on CPU, where
      the system tells).
    * ``da3/executed_flops_fraction``: share of the hosts' FLOPs that the gates let run, by epoch.

    `first_steps` holds the figures of the last fit for pictures
    (`lightning_da3.trainer.loggers.log_first_steps`).

    Args:
        domain: Its name; or, to learn several, numbers of classes by name.
        num_classes: Of the one domain; needed when it is new.
        config: For the conversion; the same for every domain of one network.
        backbone: Name of the network inside the LightningModule, such as ``net``; by default the
            one child that has convolutions.
        save_dir: Folder in which ``<domain>.safetensors`` is kept up to date after every epoch.
        predict: Predict the peak of a step; takes about as long as a few steps, once a fit.
        budget: What a step may take at its peak, as of `MemoryConfig`; None: as `config` says.

    Raises:
        ConfigError: `num_classes` is given beside a dict of domains, or that is empty.
    """

    def __init__(
        self,
        domain: str | dict[str, int],
        num_classes: int | None = None,
        config: DA3Config | None = None,
        backbone: str | None = None,
        save_dir: str | None = None,
        predict: bool = True,
        budget: int | str | None = None,
    ) -> None:
        super().__init__()
        self.domain = domain
        self.num_classes = num_classes
        self.config = (config or DA3Config()).within(budget)
        self.backbone = backbone
        self.save_dir = save_dir
        self.predict = predict
        self.session = TrainingSession(_domains(domain, num_classes), self.config, backbone)
        self.first_steps: FirstSteps | None = None
        self._before_evaluation: str | None = None

    @property
    def model(self) -> DA3Model | None:
        """The converted network, or None before the first run."""
        return self.session.model

    @property
    @override
    def state_key(self) -> str:
        return state_key(self.session.domains)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "domains": list(self.session.domains)
        }  # without a state there is no key in checkpoints

    @property
    def path(self) -> Path | None:
        """Where the domain is saved, the first of several; None without `save_dir`."""
        return self._path(next(iter(self.session.domains)))

    def _path(self, domain: str) -> Path | None:
        return None if self.save_dir is None else Path(self.save_dir) / f"{domain}.safetensors"

    # --- conversion -------------------------------------------------------------------------------

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        others = [c for c in trainer.callbacks if isinstance(c, DA3Callback) and c is not self]  # type: ignore[attr-defined]
        if others:
            domains = dict.fromkeys(
                [*self.session.domains, *(d for c in others for d in c.session.domains)], 10
            )
            raise ConfigError(
                "The Trainer has several DA3Callbacks, of which each would undo the others. Give "
                f"it one for all their domains: DA3Callback({domains}), numbers of classes by name."
            )
        if stage == "fit" and starts_processes(trainer.strategy):
            check_converted_before(trainer.strategy, pl_module, self.backbone)
        self.session.bind(trainer)
        if not builds_later(pl_module):
            self.session.attach(pl_module, trainer)

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.ckpt_path is None and trainer.global_step > 0 and trainer.fit_loop.done:
            raise DA3Error(
                f"This fit would train {list(self.session.domains)} for 0 steps: the Trainer has "
                f"reached max_epochs={trainer.max_epochs}, max_steps={trainer.max_steps} in an "
                "earlier fit. Make a new Trainer for every fit, or raise "
                "`trainer.fit_loop.max_epochs`."
            )

    # --- training ---------------------------------------------------------------------------------

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self.model is not None
        self.model.train()  # Lightning leaves a module in eval that came in eval
        self.model.gates_over_ranks = trainer.world_size > 1
        compiled = getattr(pl_module, "_compiler_ctx", None) is not None
        # the hooks of a compiled step would be compiled with it, and gradients be lost
        predict = self.predict and trainer.world_size == 1
        self.first_steps = None if compiled else FirstSteps(self.model, predict=predict)
        self.model.budget_policy.tell = rank_zero_info

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self.model is not None
        self.model.gates_over_ranks = False

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.session.check_frozen()  # the last of a fit's hooks

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert self.model is not None
        self.model.set_progress(_progress(trainer))
        self.model.gate_loss_scale = loss_scale(trainer) / trainer.accumulate_grad_batches
        if self.first_steps is not None:
            device = pl_module.device
            peak_on = device if _can_measure_peak(trainer, device) else None
            self.first_steps.begin(pl_module, batch, peak_on=peak_on)

    @override
    def on_before_backward(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor
    ) -> None:
        steps = self.first_steps
        if steps is not None and steps.forward_ended():
            _log(pl_module, "da3/saved_activation_bytes", steps.saved_activation_bytes)
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
        if self.first_steps is not None and self.first_steps.end():
            self._log_peak(pl_module, self.first_steps)
        fraction = self.model.executed_flops_fraction
        if fraction is not None:
            _log(pl_module, "da3/executed_flops_fraction", fraction)

    def _log_peak(self, pl_module: L.LightningModule, steps: FirstSteps) -> None:
        _log(pl_module, "da3/peak_bytes", steps.peak_bytes)
        if steps.predicted is not None:
            _log(pl_module, "da3/predicted_peak_bytes", steps.predicted.peak_bytes)
        if steps.surprising:
            rank_zero_warn(_surprised(steps), category=PredictionWarning)

    @override
    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        if self.first_steps is not None:
            self.first_steps.abort()
        if self.model is not None:
            self.model.gates_over_ranks = False  # the other ranks may be gone

    # --- evaluation -------------------------------------------------------------------------------

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._remember()

    @override
    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._remember()

    @override
    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._remember()

    @override
    def on_validation_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._activate(trainer.val_dataloaders, dataloader_idx)

    @override
    def on_test_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._activate(trainer.test_dataloaders, dataloader_idx)

    @override
    def on_predict_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._activate(trainer.predict_dataloaders, dataloader_idx)

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._return()

    @override
    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._return()

    @override
    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._return()

    def _remember(self) -> None:
        assert self.model is not None
        self._before_evaluation = self.model.active_domain

    def _return(self) -> None:
        assert self.model is not None
        self.model.set_domain(self._before_evaluation)

    def _activate(self, loaders: Any, dataloader_idx: int) -> None:
        """The domain that a loader is of, if loaders are named by domain."""
        assert self.model is not None
        if isinstance(loaders, Mapping) and {*loaders} <= {*self.model.domains}:
            self.model.set_domain(list(loaders)[dataloader_idx])
        elif len(self.session.domains) > 1:
            raise ConfigError(
                f"This run is of {list(self.session.domains)}, so its loaders must say of which "
                "domain they are: give a dict of loaders by name of the domain."
            )

    # --- files ------------------------------------------------------------------------------------

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        resident = resident_bytes() if pl_module.device.type == "cpu" else None
        if resident is not None:
            _log(pl_module, "da3/resident_bytes", resident)
        if self.save_dir is not None and trainer.is_global_zero:
            self._save(Path(self.save_dir), _finite(trainer.callback_metrics))

    def _save(self, folder: Path, metrics: dict[str, float]) -> None:
        assert self.model is not None
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"Cannot make the folder {str(folder)!r}: {error}.") from error
        for domain in self.session.domains:
            self.model.save_domain(domain, folder / f"{domain}.safetensors", metrics=metrics)

    def _not_finite(self, loss: Tensor) -> str:
        assert self.model is not None
        domain = self.model.active_domain or ""
        path = self._path(domain)
        if path is None:
            kept = "No state was saved: give DA3Callback a `save_dir`."
        elif path.exists():
            kept = f"The last good state is {str(path)!r}."
        else:
            kept = "No epoch was finished yet, so no state was saved."
        return (
            f"The loss of domain {domain!r} is {loss.item()}; the step was not taken. {kept} "
            "Lower the learning rate, clip gradients (Trainer(gradient_clip_val=1.0)), or look "
            "for NaN in the data."
        )


def _domains(domain: str | Mapping[str, int], num_classes: int | None) -> Mapping[str, int | None]:
    if isinstance(domain, str):
        return {domain: num_classes}
    if not isinstance(domain, Mapping) or not domain:
        raise ConfigError(
            f"`domain` must be a name or a dict of numbers of classes by name, got {domain!r}."
        )
    if num_classes is not None:
        raise ConfigError(
            f"`num_classes` is {num_classes!r} beside {domain!r}, which holds every domain's own. "
            "Leave it out."
        )
    return dict(domain)


def _log(pl_module: L.LightningModule, key: str, value: float | Tensor | None) -> None:
    assert value is not None
    value = value if isinstance(value, Tensor) else float(value)
    pl_module.log(key, value, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)


def _can_measure_peak(trainer: L.Trainer, device: torch.device) -> bool:
    """Known kinds of device, and on CPU no other profiler: only one can run at a time."""
    if trainer.world_size > 1:
        return False
    return device.type == "cuda" or (device.type == "cpu" and not is_profiling())


def _surprised(steps: FirstSteps) -> str:
    assert steps.predicted is not None and steps.peak_bytes is not None
    said, found = steps.predicted.peak_bytes / 2**20, steps.peak_bytes / 2**20
    return (
        f"A training step peaked at {found:.1f} MiB above its start; {said:.1f} MiB were predicted "
        "for the network. What `training_step` computes beside the network, its loss and the "
        "optimizer take memory as well: leave room for them where you choose a batch by the "
        "prediction. DA3Callback(predict=False) predicts nothing."
    )


def _progress(trainer: L.Trainer) -> float:
    total = trainer.estimated_stepping_batches
    return 1.0 if math.isinf(total) or total <= 0 else min(1.0, trainer.global_step / total)


def _finite(metrics: dict[str, Any]) -> dict[str, float]:
    values = {name: float(value) for name, value in metrics.items()}
    return {name: value for name, value in values.items() if math.isfinite(value)}
