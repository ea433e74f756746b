"""Loaders to validate, test or predict with, named by domain: each is computed with its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
from typing_extensions import override

from lightning_da3.errors import ConfigError
from lightning_da3.trainer.session import TrainingSession
from lightning_da3.trainer.tracking import Tracking


class EvaluatesByDomain(L.Callback):
    """Activates the domain that an evaluation loader is named by, and afterwards the one before.

    Of several loaders what is logged has the name of the domain (`DomainNames`).

    Attributes:
        session: What the run learns.
        tracking: What its loggers are given.
    """

    session: TrainingSession
    tracking: Tracking
    _before_evaluation: str | None = None

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin(pl_module)

    @override
    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin(pl_module)

    @override
    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin(pl_module)

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
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.session.names.pause()

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._return()
        self.tracking.evaluated(trainer)

    @override
    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.session.names.pause()

    @override
    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._return()
        self.tracking.evaluated(trainer)

    @override
    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._return()

    def _begin(self, pl_module: L.LightningModule) -> None:
        self._before_evaluation = self.session.network.active_domain
        self.session.names.begin(pl_module, training=False)

    def _return(self) -> None:
        self.session.names.end()
        self.session.activate(self._before_evaluation)

    def _activate(self, loaders: Any, dataloader_idx: int) -> None:
        network = self.session.network
        if isinstance(loaders, Mapping) and {*loaders} <= {*network.domains}:
            name = list(loaders)[dataloader_idx]
            if len(loaders) > 1 or len(self.session.domains) > 1:
                self.session.turn_to(name)
            else:
                self.session.activate(name)
        elif len(self.session.domains) > 1:
            raise ConfigError(
                f"This run is of {list(self.session.domains)}, so its loaders must say of which "
                "domain they are: give a dict of loaders by name of the domain."
            )
