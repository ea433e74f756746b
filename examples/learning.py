"""A LightningModule for any classifier, and what trains and evaluates it. Knows nothing of DA3."""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from datasets import DomainData
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.functional import accuracy

BATCH_SIZE = 32


def adamw(network: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=1e-4)


class Classifier(L.LightningModule):
    """Trains a network, by default with AdamW, under a one-cycle schedule."""

    def __init__(
        self,
        network: nn.Module,
        learning_rate: float,
        optimizer: Callable[[nn.Module, float], torch.optim.Optimizer] = adamw,
    ) -> None:
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last)
        self.learning_rate = learning_rate
        self.optimizer = optimizer

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images.contiguous(memory_format=torch.channels_last))

    def training_step(self, batch: Any, _: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, _: int) -> None:
        scores = self(batch[0])
        right = accuracy(scores, batch[1], task="multiclass", num_classes=scores.shape[1])
        self.log("test_accuracy", right, prog_bar=True)

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.network, self.learning_rate)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=[group["lr"] for group in optimizer.param_groups],
            total_steps=int(self.trainer.estimated_stepping_batches),
            pct_start=0.1,
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Bar(TQDMProgressBar):
    """Lightning's bar without the logger's version."""

    def get_metrics(self, *arguments: Any) -> dict[str, Any]:
        return {k: v for k, v in super().get_metrics(*arguments).items() if k != "v_num"}


def fit(
    module: Classifier,
    data: DomainData,
    epochs: int,
    most_batches: int | None,
    loggers: Sequence[Logger],
    callbacks: Sequence[L.Callback] = (),
    batch_size: int = BATCH_SIZE,
    *,
    bar: bool = True,
) -> None:
    """One Lightning Trainer for one domain; Ctrl-C ends the program, as it should."""
    batch_size = min(batch_size, len(data.train))
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        limit_train_batches=most_batches,
        limit_val_batches=most_batches,
        log_every_n_steps=1000,  # the epoch's figures are enough
        logger=list(loggers),
        callbacks=[*([Bar(refresh_rate=10)] if bar else []), *callbacks],
        enable_progress_bar=bar,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(
        module,
        DataLoader(data.train, batch_size=batch_size, shuffle=True, drop_last=True),
        DataLoader(data.test, batch_size=256),
    )
    if trainer.interrupted:  # Lightning exits by itself, but did not always
        raise KeyboardInterrupt


def loggers_for(folder: Path, domain: str, method: str, tracker: Logger | None) -> list[Logger]:
    """A CSV log of its own and, in the one W&B run, a prefix of its own: no curves overlap."""
    version = f"{method}-{domain}".replace(" ", "-")
    shutil.rmtree(folder / "logs" / version, ignore_errors=True)  # of an earlier run
    loggers: list[Logger] = [CSVLogger(folder, name="logs", version=version)]
    if isinstance(tracker, WandbLogger):
        prefix = f"{domain}/{method}".replace(" ", "-")
        loggers.append(WandbLogger(experiment=tracker.experiment, prefix=prefix))
    return loggers


@torch.no_grad()
def scores_of(module: nn.Module, images: Tensor) -> Tensor:
    """What the network says in eval, in batches of one size."""
    training = module.training
    module.eval()
    scores = torch.cat([module(part) for part in images.split(256)])
    module.train(training)
    return scores


def silence_lightning() -> None:
    """Leave the progress bar and our own lines."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers")
    warnings.filterwarnings("ignore", ".*in eval mode at the start of training")
    warnings.filterwarnings("ignore", "Experiment logs directory")
    warnings.filterwarnings("ignore", ".*smaller than the logging interval")
    warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated", FutureWarning)
