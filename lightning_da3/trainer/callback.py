"""DA3Callback: one line in a Trainer. Hooks of a few lines that call the core."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from lightning_da3.config import DA3Config
from lightning_da3.errors import ConfigError, DA3Error
from lightning_da3.formatting import shown
from lightning_da3.model.model import DA3Model
from lightning_da3.trainer.branch_choice import choose_branches
from lightning_da3.trainer.building import stop_waiting, when_built
from lightning_da3.trainer.domain_files import DomainFiles
from lightning_da3.trainer.evaluation import EvaluatesByDomain
from lightning_da3.trainer.figures import Figures
from lightning_da3.trainer.first_steps import FirstSteps
from lightning_da3.trainer.head_start import start_heads
from lightning_da3.trainer.lightning_private import (
    find_unused_parameters_,
    lend_summary_,
    starts_processes,
)
from lightning_da3.trainer.loading import state_key
from lightning_da3.trainer.model_summary import UsersSummary
from lightning_da3.trainer.refusals import (
    check_converted_before,
    check_plugins,
    check_strategy,
    nothing_to_learn,
)
from lightning_da3.trainer.saying import Saying
from lightning_da3.trainer.session import TrainingSession
from lightning_da3.trainer.steps import explain_targets_, loss_scale
from lightning_da3.trainer.strategy_methods import lend_methods_
from lightning_da3.trainer.tracking import Tracking


class DA3Callback(EvaluatesByDomain):
    """Learn one domain, or several, with the network inside any LightningModule.

    Before the optimizers are made, the network is converted (once, in place of the original) and
    the domain is added or selected. Only the domain's parameters train, with what requires a
    gradient beside the network, of which every domain has its own; Lightning's checkpoints hold the
    domains alone. The LightningModule needs no change.

    Several domains in one run take turns, batch by batch: give their numbers of classes by name,
    and a `DomainLoader` of their loaders. Loaders to validate, test or predict with may be a dict
    by domain in any run; each is computed with its own. What the module logs then has the name of
    the domain: ``loss/flowers`` beside ``loss`` in training, ``acc/flowers`` in evaluation.

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
    * ``da3/executed_flops_fraction``: with gates, the share of the hosts' FLOPs that they let run;
      of domains that skip, of the network's; by epoch. Of several domains also ``../<domain>``.

    Beside them settings, tables, pictures, and with Weights & Biases curves of every domain and the
    domains themselves (`lightning_da3.trainer.tracking`).

    Args:
        domain: The name of the domain; or, to learn several, numbers of classes by name.
        num_classes: The number of classes of the one domain; needed when it is new: it gets a
            fresh classifier, which trains, in the place of the pretrained one. None where there is
            none to replace: the network's own output layers are frozen then (a line in the log
            says so, unless `config` does with ``head=None``), and adapters train, with what is
            outside of the network.
        config: The choices for the conversion, or a dict of them as YAML gives it; the same for
            every domain of one network.
        backbone: Name of the network inside the LightningModule, such as ``net``; by default the
            one child that has convolutions.
        save_dir: Folder in which ``<domain>.safetensors`` is kept up to date after every epoch. The
            file of an earlier fit is ``<domain>.safetensors.previous`` until this one has come to
            its end, and is put back if it fails. Nothing is written with ``fast_dev_run``.
        predict: Predict the peak of a step; takes about as long as a few steps, once a fit.
        budget: The peak bytes that a step may take, as in `MemoryConfig`; None: as `config` says.
        monitor: A logged metric: the file, of an earlier fit as well, is replaced only by an epoch
            in which it is at least as good. None: by every epoch. Of several domains, each by
            ``<monitor>/<domain>`` where that is logged.
        mode: Whether less of it is better (``"min"``) or more (``"max"``).
        outside: What becomes of what requires a gradient beside the network, and of buffers next to
            it. ``"domain"``: it belongs to the domain, as its adapters do. ``"shared"``: all
            domains train the same, and so change each other, which a warning says. ``"frozen"``: it
            does not train; statistics next to it are the domain's.
        start_head: Start the head of a domain that has learned nothing yet where its training
            batches say, as `DA3Model.start_head` does: one more pass over them, through
            `training_step`, before the first step. It is worth most where training is short.

    Raises:
        ConfigError: `num_classes` is given beside a dict of domains, or that is empty; or a metric
            is monitored without a `save_dir`.
        DomainError: With a `save_dir`, names differ by case alone.
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
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        outside: Literal["domain", "shared", "frozen"] = "domain",
        start_head: bool = False,
    ) -> None:
        super().__init__()
        self.domain = domain
        self.start_head = start_head
        self.num_classes = num_classes
        self.config = DA3Config.of(config).within(budget)
        self.backbone = backbone
        self.session = TrainingSession(
            _domains(domain, num_classes), self.config, backbone, outside
        )
        self.files = DomainFiles(save_dir, self.session.domains, monitor, mode)
        self.figures = Figures(predict)
        self.saying = Saying()
        self.tracking = Tracking(self.session, self.files)

    @property
    def model(self) -> DA3Model | None:
        """The converted network, or None before the first run."""
        return self.session.model

    @property
    def path(self) -> Path | None:
        """The file of the domain, or of the first of several; None without `save_dir`."""
        return self.files.path(next(iter(self.session.domains)))

    @property
    def first_steps(self) -> FirstSteps | None:
        """What the first steps of the last fit took."""
        return self.figures.first_steps

    @property
    @override
    def state_key(self) -> str:
        return state_key(self.session.domains)

    @override
    def state_dict(self) -> dict[str, Any]:
        # checkpoints hold the key of a callback only with a state
        return {"domains": list(self.session.domains), "steps": self.tracking.curves.steps}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tracking.curves.steps = dict(state_dict.get("steps", {}))

    # --- conversion -------------------------------------------------------------------------------

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._check_alone(trainer)
        check_strategy(trainer.strategy)
        check_plugins(trainer)
        if stage == "fit" and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.files.check()
        if stage == "fit" and starts_processes(trainer.strategy):
            check_converted_before(trainer.strategy, pl_module, self.backbone)
        when_built(pl_module, partial(self._convert, trainer, pl_module))
        self.tracking.begin(trainer)

    def _check_alone(self, trainer: L.Trainer) -> None:
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        others = [c for c in callbacks if isinstance(c, DA3Callback) and c is not self]
        if others:
            names = [*self.session.domains, *(d for c in others for d in c.session.domains)]
            raise ConfigError(
                "The Trainer has several DA3Callbacks, of which each would undo the others. Give "
                f"it one for all their domains: DA3Callback({dict.fromkeys(names, 10)}), numbers "
                "of classes by name."
            )

    def _convert(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.session.attach(pl_module, trainer)
        lend_methods_(trainer.strategy, self.session)
        lend_summary_(trainer, UsersSummary)
        if trainer.state.fn == "fit":
            self.session.open_domains()
            if self.session.may_leave_out:
                find_unused_parameters_(trainer.strategy)

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.ckpt_path is None and trainer.global_step > 0 and trainer.fit_loop.done:
            raise DA3Error(
                f"This fit would train {list(self.session.domains)} for 0 steps: the Trainer has "
                f"reached max_epochs={trainer.max_epochs}, max_steps={trainer.max_steps} in an "
                "earlier fit. Make a new Trainer for every fit, or raise "
                "`trainer.fit_loop.max_epochs`."
            )
        self.session.begin_fit(trainer)

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.session.end_fit()  # the last of a fit's hooks
        self.files.end()
        self.tracking.finished(trainer)

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.session.close_domains()
        self.tracking.close()

    # --- training ---------------------------------------------------------------------------------

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        model = self.session.network
        model.train()  # Lightning leaves a module in eval that came in eval
        model.gates_over_ranks = trainer.world_size > 1
        model.budget_policy.tell = rank_zero_info
        choose_branches(trainer, pl_module, self.session)
        if self.start_head:
            start_heads(trainer, pl_module, self.session)
        self.figures.start(trainer, pl_module, model)
        self.saying.start()
        self.tracking.start(pl_module)
        if len(self.session.domains) > 1:
            self.session.names.begin(pl_module, training=True)
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            resumed = trainer.ckpt_path is not None and trainer.global_step > 0
            self.files.begin(model, resumed=resumed, write=trainer.is_global_zero)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.saying.end(trainer, self.session.network)
        self.session.network.gates_over_ranks = False
        self.session.network.gate_loss_scale = None  # another loop may follow
        self.session.names.end()
        self._all_logged(trainer, last=True)
        self.tracking.end(trainer, self.first_steps)

    @override
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.saying.epoch_begins()
        self._all_logged(trainer, last=not _validates_later(trainer))

    def _all_logged(self, trainer: L.Trainer, *, last: bool) -> None:
        """What modules log when an epoch ends, they log behind the hooks of callbacks."""
        self.files.logged(self.session.network, trainer.callback_metrics, last=last)

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        model = self.session.network
        model.set_progress(_progress(trainer))
        if pl_module.automatic_optimization:  # else the module's own step may do as it likes
            model.gate_loss_scale = loss_scale(trainer) / trainer.accumulate_grad_batches
        self.figures.step_begins(trainer, pl_module, batch)
        self.tracking.step_begins()

    @override
    def on_before_backward(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor
    ) -> None:
        self.figures.backward_begins(pl_module)
        if not loss.requires_grad:
            raise DA3Error(nothing_to_learn(self.session.network))
        if not torch.isfinite(loss):
            domain = self.session.network.active_domain or ""
            raise DA3Error(
                f"The loss of domain {domain!r} is {loss.item()}; the step was not taken. "
                f"{self.files.last_good(domain)} Lower the learning rate, clip gradients "
                "(Trainer(gradient_clip_val=1.0)), or look for NaN in the data."
            )

    @override
    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        model = self.session.network
        self.figures.step_ends(pl_module, model)
        steps, outside = self.figures.first_steps, self.session.outside_parameters
        self.saying.step_ends(pl_module, model, self.session.domains, steps, outside)
        self.tracking.step_ends(batch, self.saying.status)

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.session.names.pause()
        self.figures.epoch_ends(pl_module)
        model, metrics = self.session.network, trainer.callback_metrics
        self.files.end_epoch(model, metrics)
        self.tracking.epoch_ends(trainer, self.first_steps)

    @override
    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self.figures.abort()
        self.session.names.abort()
        self.tracking.close()
        explain_targets_(exception, self.model)
        self.files.abort()
        stop_waiting(pl_module)
        self.session.close_domains()
        if self.model is not None:
            self.model.gates_over_ranks = False  # the other ranks may be gone


def _domains(domain: str | Mapping[str, int], num_classes: int | None) -> Mapping[str, int | None]:
    if isinstance(domain, str):
        return {domain: num_classes}
    if not isinstance(domain, Mapping) or not domain:
        raise ConfigError(
            f"`domain` must be a name or a dict of numbers of classes by name, got {shown(domain)}."
        )
    if num_classes is not None:
        raise ConfigError(
            f"`num_classes` is {num_classes!r} beside {domain!r}, which holds every domain's own. "
            "Leave it out."
        )
    return dict(domain)


def _validates_later(trainer: L.Trainer) -> bool:
    """Whether a validation that was not in this epoch may be in a later one."""
    return trainer.enable_validation and trainer.check_val_every_n_epoch != 1


def _progress(trainer: L.Trainer) -> float:
    total = trainer.estimated_stepping_batches
    return 1.0 if math.isinf(total) or total <= 0 else min(1.0, trainer.global_step / total)
