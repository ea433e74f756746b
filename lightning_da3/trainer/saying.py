"""What is said of a fit: what it learns, once, and at its end if the gates went elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_da3.errors import NoEffectWarning
from lightning_da3.model.model import DA3Model
from lightning_da3.model.status import Status, StepFigures
from lightning_da3.trainer.first_steps import FirstSteps

OFF_BY = 0.1  # of the hosts' FLOPs
ENOUGH_STEPS = 100  # in fewer no gate learns to close


class Saying:
    """Says once what a fit learns, when its first step has shown what that takes.

    Attributes:
        status: What was said in the last fit; None before.
    """

    def __init__(self) -> None:
        self.status: Status | None = None
        self._said = False
        self._executed: dict[str, tuple[Tensor, int]] = {}  # sum and steps, of this epoch

    def start(self) -> None:
        """A training begins."""
        self._said = False

    def epoch_begins(self) -> None:
        """An epoch begins."""
        self._executed = {}

    def step_ends(
        self,
        pl_module: L.LightningModule,
        model: DA3Model,
        domains: Iterable[str],
        steps: FirstSteps | None,
        outside: Mapping[str, int] | None = None,
    ) -> None:
        """A training step is over.

        Args:
            pl_module: Holds the network.
            model: The network.
            domains: The names of the domains that train.
            steps: What the first steps took, as far as it is known by now.
            outside: Numbers of parameters outside the network that train with the domain, by name.
        """
        share, active = model.decided_flops_fraction, model.active_domain
        if share is not None and active is not None:
            total, count = self._executed.get(active, (torch.zeros_like(share), 0))
            self._executed[active] = total + share, count + 1
        if self._said:
            return
        self._said = True
        figures = None if steps is None else _figures(steps)
        name = _name_of(model, pl_module)
        self.status = model.status(name=name, domains=domains, outside=outside, step=figures)
        rank_zero_info(f"{self.status}")
        if steps is not None and steps.no_effect:
            rank_zero_warn(
                f"{steps.no_effect} That is less than half: DA3 saves little here. "
                f"`print(module.{name}.plan)` says what every layer keeps.",
                category=NoEffectWarning,
            )

    def end(self, trainer: L.Trainer, model: DA3Model) -> None:
        """A training is over."""
        gate = model.config.cell_gates
        if gate is None or trainer.global_step < ENOUGH_STEPS:
            return
        for name, (total, count) in self._executed.items():
            share = float(total) / count
            if abs(share - gate.target) > OFF_BY:
                rank_zero_warn(
                    f"The gates of domain {name!r} let {share:.0%} of the hosts' FLOPs run in the "
                    f"last epoch; the target is {gate.target:.0%}. Train longer, or set another "
                    "`GateConfig(by='cell', weight=...)`: a larger one moves the gates more.",
                    category=NoEffectWarning,
                )


def _name_of(model: DA3Model, pl_module: L.LightningModule) -> str:
    return next((name for name, module in pl_module.named_modules() if module is model), "")


def _figures(steps: FirstSteps) -> StepFigures | None:
    kept = steps.kept_bytes
    if kept is None:
        return None
    predicted = steps.predicted
    return StepFigures(
        samples=steps.samples,
        kept_bytes=kept,
        finetune_kept_bytes=steps.finetune_kept_bytes,
        peak_bytes=None if predicted is None else predicted.peak_bytes,
        predicted=predicted is not None,
    )
