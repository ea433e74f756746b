"""``fit_sequence``: domains one after the other, going on at the domain and step of a stop."""

from __future__ import annotations

import gc
import math
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor
from typing_extensions import override

from lightning_da3.config import DA3Config
from lightning_da3.converting import convert
from lightning_da3.errors import CheckpointError, ConfigError
from lightning_da3.files.domain_file import read_domain
from lightning_da3.files.folder import DomainFolder
from lightning_da3.files.names import check_name
from lightning_da3.files.writing import replacing
from lightning_da3.model.domain import checked_class_names
from lightning_da3.model.identity import check_identity
from lightning_da3.model.model import DA3Model
from lightning_da3.trainer.attaching import find_backbone
from lightning_da3.trainer.callback import DA3Callback


class DomainTask(NamedTuple):
    """What there is to learn of one domain; a plain tuple will do.

    Args:
        num_classes: Of its head, or None where the config has no head.
        train: Batches to train with: a dataloader, or a LightningDataModule with all loaders.
        val: Batches to validate with, or None.
        class_names: What the classes are called, or None.
    """

    num_classes: int | None
    train: Any
    val: Any = None
    class_names: Sequence[str] | None = None


def fit_sequence(
    module: Callable[[], L.LightningModule],
    tasks: Mapping[str, Any],
    trainer: Callable[..., L.Trainer],
    folder: str | os.PathLike[str],
    *,
    config: DA3Config | None = None,
    backbone: str | None = None,
    seed: int = 0,
    save_every_n_steps: int = 50,
) -> L.LightningModule:
    """Learn domains one after the other, each with a Trainer of its own.

    A finished domain is ``<folder>/<name>.safetensors``, an unfinished one
    ``<folder>/<name>.ckpt``, a checkpoint of Lightning's. Called again after a stop of any kind,
    finished domains are left as they are and the unfinished one goes on at its last checkpoint.

    Every domain starts from a new module and the same seed, so what it learns depends on no other
    domain, and time and memory do not grow with their number. A run that was stopped ends with the
    same weights as one that was not, bit for bit, given

    * one process, and operations that are deterministic (``Trainer(deterministic=True)``);
    * one training dataloader (not several at once) over the same data, whose ``__len__`` is known
      or whose samples use no random numbers, and without persistent workers that use some;
    * no state that Lightning does not restore: modules and callbacks keep theirs in a `state_dict`,
      and there is no `ReduceLROnPlateau`, whose step Lightning leaves out in a resumed epoch.

    Args:
        module: Makes the LightningModule, with the same backbone every time.
        tasks: By domain name, in the order in which to learn: (num_classes, train), or more of
            `DomainTask`.
        trainer: Makes a Trainer; called with `callbacks`, a list that must be among its callbacks,
            as in ``lambda callbacks: L.Trainer(max_epochs=5, callbacks=callbacks)``. A domain is
            finished when its Trainer says so, by whichever limit.
        folder: For the files; made if it is missing. One process at a time may learn a domain.
        config: For the conversion; the same for all domains.
        backbone: Name of the network inside the LightningModule, as for `DA3Callback`.
        seed: For every domain.
        save_every_n_steps: Optimizer steps between two checkpoints, and so about the most that a
            stop can cost: no checkpoint is made between a step and the validation behind it. The
            end of an epoch is saved, too, unless ``max_steps`` limits the Trainer.

    Returns:
        A module whose network has all the domains, none of them active.

    Raises:
        ConfigError: An argument is wrong.
        DomainError: A domain is ill-named.
        CheckpointError: A file is damaged, of another backbone, or in the way.
        KeyboardInterrupt: The training was interrupted; what was saved is kept.
    """
    domains = DomainFolder(folder)
    plans = _checked(tasks, save_every_n_steps)
    if "callbacks" in getattr(trainer, "keywords", {}):
        raise ConfigError(
            "`trainer` is a partial that has callbacks of its own, which would be lost. Give a "
            "function: lambda callbacks: L.Trainer(callbacks=[*callbacks, EarlyStopping('loss')])."
        )
    domains.make()
    done = [name for name in plans if _is_finished(domains, name)]
    learned: tuple[L.LightningModule, DA3Model] | None = None
    for name, task in plans.items():
        checkpoint = domains.path / f"{name}.ckpt"
        if name not in done:
            # the steps of all domains cost about the same
            da3 = DA3Callback(name, task.num_classes, config, backbone, predict=not done)
            finished = domains.file(done[0]) if done else None
            saver = _Saver(checkpoint, save_every_n_steps, da3, finished)
            learned = None
            gc.collect()  # room for the next: a Trainer and its module are full of cycles
            learned = _learn(module, task, trainer, domains, da3, saver, seed)
            done.append(name)
        checkpoint.unlink(missing_ok=True)
    lit, model = learned or _converted(module, backbone, config, seed)
    model.set_domain(None)
    for name in model.domains:  # all alike, in the order of the tasks, from their files
        model.delete_domain(name)
    for name in plans:
        domains.load(model, name)
    return lit


def _checked(tasks: Mapping[str, Any], save_every_n_steps: int) -> dict[str, DomainTask]:
    if save_every_n_steps < 1:
        raise ConfigError(f"`save_every_n_steps` must be at least 1, got {save_every_n_steps}.")
    if not tasks:
        raise ConfigError("`tasks` is empty: name at least one domain.")
    checked = {}
    for name, task in tasks.items():
        check_name(name)
        if not isinstance(task, tuple) or not 2 <= len(task) <= len(DomainTask._fields):
            raise ConfigError(
                f"The task of domain {name!r} must be a tuple ({', '.join(DomainTask._fields)}), "
                f"the last two optional; got {type(task).__name__}."
            )
        checked[name] = DomainTask(*task)
        checked_class_names(checked[name].class_names, checked[name].num_classes)
    return checked


def _is_finished(domains: DomainFolder, name: str) -> bool:
    path = domains.file(name)
    if not path.exists():
        return False
    extra = read_domain(path).metadata.get("extra")
    if not isinstance(extra, dict) or extra.get("finished") is not True:
        raise CheckpointError(
            f"{str(path)!r} was not written by a finished `fit_sequence`. Move it away, or give "
            "another folder: the domain would be saved over it."
        )
    return True


def _learn(
    make_module: Callable[[], L.LightningModule],
    task: DomainTask,
    make_trainer: Callable[..., L.Trainer],
    domains: DomainFolder,
    da3: DA3Callback,
    saver: _Saver,
    seed: int,
) -> tuple[L.LightningModule, DA3Model]:
    """One domain, to its end; its file is there when this returns."""
    for stale in domains.path.glob(f".{da3.domain}.*.tmp"):  # of a process that was killed
        stale.unlink(missing_ok=True)
    L.seed_everything(seed, verbose=False)
    lit = make_module()
    trainer = make_trainer(callbacks=[da3, saver])
    has: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if da3 not in has or saver not in has:
        raise ConfigError(
            "The Trainer does not have the callbacks that `trainer` was called with. Hand them on: "
            "lambda callbacks: L.Trainer(callbacks=callbacks)."
        )
    ckpt_path = str(saver.path) if _is_resumable(saver.path) else None
    with saver.watching(trainer, task.train) as data:
        trainer.fit(lit, ckpt_path=ckpt_path, val_dataloaders=task.val, **data)
    if trainer.interrupted:
        raise KeyboardInterrupt
    model = da3.model
    assert model is not None
    assert isinstance(da3.domain, str)  # as `fit_sequence` made it
    model.domain(da3.domain).class_names = checked_class_names(task.class_names, task.num_classes)
    if trainer.is_global_zero:
        metrics = _finite(trainer.callback_metrics) or saver.metrics
        domains.save(model, da3.domain, finished=True, metrics=metrics)
    trainer.strategy.barrier()
    return lit, model


def _is_resumable(path: Path) -> bool:
    """Whether there is a checkpoint; one that a pickle would be needed for is refused."""
    if not path.exists():
        return False
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds over a bad file
        raise CheckpointError(
            f"Cannot read the checkpoint {str(path)!r} ({error}). Delete it to learn the domain "
            "from its beginning."
        ) from error
    return True


def _converted(
    make_module: Callable[[], L.LightningModule],
    backbone: str | None,
    config: DA3Config | None,
    seed: int,
) -> tuple[L.LightningModule, DA3Model]:
    """A module with its network converted, without a Trainer."""
    L.seed_everything(seed, verbose=False)
    lit = make_module()
    lit.setup("fit")
    lit.configure_model()
    name = find_backbone(lit, backbone)
    model = convert(lit.get_submodule(name), config)
    lit.set_submodule(name, model)
    return lit, model


class _Saver(Checkpoint):
    """Saves what an exact resume needs, at moments from which Lightning can resume exactly.

    Those are the ends of steps behind which neither the epoch ends nor a validation begins, and the
    ends of epochs; with `max_steps`, the step that ends an epoch instead, unless it validates.

    Args:
        path: Of the one checkpoint, which every save replaces.
        every_n_steps: Optimizer steps between two saves.
        da3: Of the domain that is learned.
        finished: File of another domain, or None: it must be of the same backbone and config.
    """

    def __init__(
        self, path: Path, every_n_steps: int, da3: DA3Callback, finished: Path | None
    ) -> None:
        self.path, self.every_n_steps = path, every_n_steps
        self.da3, self.finished = da3, finished
        self.order = _Order()
        self.saved_step = self.last_step = 0
        self.metrics: dict[str, float] = {}
        self.should_stop = False

    @contextmanager
    def watching(self, trainer: L.Trainer, train: Any) -> Iterator[dict[str, Any]]:
        """What `Trainer.fit` is to be given: the data, with an order that can be resumed."""
        from_module = isinstance(train, L.LightningDataModule)
        if trainer.world_size > 1:  # Lightning gives every process its share of a plain dataloader
            yield {"datamodule" if from_module else "train_dataloaders": train}
        elif from_module:
            make = train.train_dataloader
            train.train_dataloader = lambda: _ResumableLoader(make(), self.order)
            try:
                yield {"datamodule": train}
            finally:
                del train.train_dataloader  # the instance's own: what the class says is back
        else:
            yield {"train_dataloaders": _ResumableLoader(train, self.order)}

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
        self.saved_step = trainer.global_step
        self.metrics, self.should_stop = _finite(trainer.callback_metrics), trainer.should_stop
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


class _Order:
    """How many batches of an epoch were trained with, and the random state that ordered them.

    An epoch is gone on with by taking its first batches again, unused, from the random state in
    which they were taken before.
    """

    def __init__(self) -> None:
        self.batches = 0
        self.epoch_rng: dict[str, Any] = {}
        self.generators: list[torch.Generator] = []
        self._resume: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors."""
        rng = _rng_state(self.generators)
        return {"batches": self.batches, "epoch_rng": self.epoch_rng, "rng": rng}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Used when batches are asked for next."""
        self._resume = state

    def batches_of(self, loader: Any) -> Iterator[Any]:
        """One epoch, or the rest of one; nothing happens before the first batch is asked for."""
        owners = (loader, getattr(loader, "sampler", None))
        found = [getattr(owner, "generator", None) for owner in owners]
        self.generators = list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())
        resume, self._resume = self._resume, None
        taken = 0 if resume is None else resume["batches"]
        if resume is not None:
            _set_rng_state(resume["epoch_rng" if taken else "rng"], self.generators)
        self.epoch_rng = _rng_state(self.generators)
        batches = iter(loader)
        if resume is not None and taken:
            for _ in islice(batches, taken):
                pass
            _set_rng_state(resume["rng"], self.generators)
        yield from batches


class _ResumableLoader:
    """A dataloader whose order of batches outlives a stop; in all else, the one that it wraps."""

    def __init__(self, loader: Any, order: _Order) -> None:
        self.loader, self.order = loader, order

    def __iter__(self) -> Iterator[Any]:
        return self.order.batches_of(self.loader)

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def state_dict(self) -> dict[str, Any]:
        """By which Lightning tells that it can be resumed; `_Saver` has the state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to do."""


def _by_steps(trainer: L.Trainer) -> bool:
    return trainer.max_steps != -1


def _validates(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether a validation begins behind this batch."""
    every = trainer.val_check_batch
    whole = trainer.check_val_every_n_epoch is None
    count = trainer.fit_loop.total_batch_idx if whole else batch_idx
    return trainer.enable_validation and every is not None and (count + 1) % every == 0


def _rng_state(generators: Sequence[torch.Generator]) -> dict[str, Any]:
    """Of every generator that training may draw from; plain types and tensors."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 - the one that others draw from
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "python": random.getstate(),
        "loader": [generator.get_state() for generator in generators],
    }


def _set_rng_state(state: dict[str, Any], generators: Sequence[torch.Generator]) -> None:
    torch.set_rng_state(state["torch"].cpu())
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([device.cpu() for device in state["cuda"]])
    np.random.set_state(tuple(state["numpy"]))  # noqa: NPY002
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    for generator, its_state in zip(generators, state["loader"], strict=True):
        generator.set_state(its_state.cpu())


def _finite(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    values = {name: float(value) for name, value in metrics.items()}
    return {name: value for name, value in values.items() if math.isfinite(value)}
