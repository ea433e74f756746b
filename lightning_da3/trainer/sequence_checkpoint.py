"""The checkpoint of an unfinished domain of `fit_sequence`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from typing_extensions import override

from lightning_da3.errors import CheckpointError
from lightning_da3.files.domain_file import read_domain
from lightning_da3.files.writing import replacing
from lightning_da3.model.identity import check_identity
from lightning_da3.trainer.callback import DA3Callback
from lightning_da3.trainer.figures import finite
from lightning_da3.trainer.resuming import BatchOrder, ResumableLoader


class SequenceCheckpoint(Checkpoint):
    """Saves what an exact resume needs, at moments from which Lightning can resume exactly.

    Those are the ends of steps behind which neither the epoch ends nor a validation begins, and the
    ends of epochs; with `max_steps`, the step that ends an epoch instead, unless it validates.

    Args:
        path: The one checkpoint, which every save replaces.
        every_n_steps: Optimizer steps between two saves.
        da3: The callback that learns the domain.
        finished: File of another domain, or None; it must be of the same backbone and config.
    """

    def __init__(
        self, path: Path, every_n_steps: int, da3: DA3Callback, finished: Path | None
    ) -> None:
        self.path, self.every_n_steps = path, every_n_steps
        self.da3, self.finished = da3, finished
        self.order = BatchOrder()
        self.saved_step = self.last_step = 0
        self.metrics: dict[str, float] = {}
        self.should_stop = False

    @property
    @override
    def state_key(self) -> str:
        return "_Saver"  # as in checkpoints of earlier versions

    @contextmanager
    def watching(self, trainer: L.Trainer, train: Any) -> Iterator[dict[str, Any]]:
        """What `Trainer.fit` is to be given: the data, with an order that can be resumed."""
        from_module = isinstance(train, L.LightningDataModule)
        if trainer.world_size > 1:  # Lightning gives every process its share of a plain dataloader
            yield {"datamodule" if from_module else "train_dataloaders": train}
        elif from_module:
            make = train.train_dataloader
            train.train_dataloader = lambda: ResumableLoader(make(), self.order)
            try:
                yield {"datamodule": train}
            finally:
                del train.train_dataloader  # the instance's own: what the class says is back
        else:
            yield {"train_dataloaders": ResumableLoader(train, self.order)}

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.finished is not None and self.da3.model is not None:
            check_identity(self.da3.model, read_domain(self.finished).metadata, str(self.finished))
        trainer.should_stop = self.should_stop  # a callback of before the stop may have said so
        self.saved_step = self.last_step = trainer.global_step

    @override
    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        last = trainer.is_last_batch
        self.order.batches = 0 if last else batch_idx + 1
        stepped = trainer.global_step > self.last_step  # else gradients are being accumulated
        self.last_step = trainer.global_step
        due = trainer.global_step - self.saved_step >= self.every_n_steps
        exact = (not last or _by_steps(trainer)) and not _validates(trainer, batch_idx)
        if due and stepped and exact:
            self._save(trainer)

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.order.batches = 0
        if not _by_steps(trainer):
            self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self.saved_step = trainer.global_step
        self.metrics, self.should_stop = finite(trainer.callback_metrics), trainer.should_stop
        try:
            if trainer.is_global_zero:
                with replacing(self.path) as temporary:
                    trainer.save_checkpoint(temporary, weights_only=False)
            else:
                trainer.save_checkpoint(
                    self.path, weights_only=False
                )  # takes part and writes nothing
        except OSError as error:
            raise CheckpointError(
                f"Cannot write the checkpoint {str(self.path)!r}: {error}. The one before is kept. "
                "Check the folder's permissions and free space."
            ) from error

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "order": self.order.state_dict(),
            "metrics": self.metrics,
            "should_stop": self.should_stop,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.metrics, self.should_stop = state_dict["metrics"], state_dict["should_stop"]
        self.order.load_state_dict(state_dict["order"])


def _by_steps(trainer: L.Trainer) -> bool:
    return trainer.max_steps != -1


def _validates(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether a validation begins behind this batch."""
    every = trainer.val_check_batch
    whole = trainer.check_val_every_n_epoch is None
    count = trainer.fit_loop.total_batch_idx if whole else batch_idx
    return trainer.enable_validation and every is not None and (count + 1) % every == 0
