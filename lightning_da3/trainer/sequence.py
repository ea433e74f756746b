"""``fit_sequence``: domains one after the other, resumed at the domain and step of a stop."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning as L
import torch

from lightning_da3.config import DA3Config
from lightning_da3.converting import convert
from lightning_da3.errors import CheckpointError, ConfigError
from lightning_da3.files.domain_file import read_domain
from lightning_da3.files.folder import DomainFolder
from lightning_da3.files.names import check_apart, check_name
from lightning_da3.files.reading import check_readable
from lightning_da3.files.writing import remove_abandoned
from lightning_da3.formatting import shown
from lightning_da3.model.domain import check_num_classes, checked_class_names
from lightning_da3.model.holder import hold_
from lightning_da3.model.model import DA3Model
from lightning_da3.trainer.attaching import check_checkpoint, put_
from lightning_da3.trainer.callback import DA3Callback
from lightning_da3.trainer.figures import finite
from lightning_da3.trainer.finding import find_backbone
from lightning_da3.trainer.loggers import SequenceRuns
from lightning_da3.trainer.sequence_checkpoint import SequenceCheckpoint


class DomainTask(NamedTuple):
    """What there is to learn of one domain; a plain tuple will do.

    Args:
        num_classes: Number of classes of its head, or None where the config has no head.
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
    config: DA3Config | Mapping[str, Any] | None = None,
    backbone: str | None = None,
    outside: Literal["domain", "frozen"] = "domain",
    seed: int = 0,
    save_every_n_steps: int = 50,
) -> L.LightningModule:
    """Learn domains one after the other, each with a Trainer of its own.

    A finished domain is ``<folder>/<name>.safetensors``, an unfinished one
    ``<folder>/<name>.ckpt``, a checkpoint of Lightning's. Called again after a stop of any kind,
    finished domains are left as they are and the unfinished one resumes at its last checkpoint.

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
        trainer: Makes a Trainer, with a `WandbLogger` of its own, say, for a run of every domain,
            all in one group; called with `callbacks`, a list that must be among its callbacks,
            as in ``lambda callbacks: L.Trainer(max_epochs=5, callbacks=callbacks)``. A domain is
            finished when its Trainer says so, by whichever limit. With ``fast_dev_run`` every
            unfinished domain is tried, and nothing is written to `folder`.
        folder: The folder of the files; made if it is missing. One process at a time may learn a
            domain.
        config: The choices for the conversion, or a dict of them; the same for all domains.
        backbone: Name of the network inside the LightningModule, as for `DA3Callback`.
        outside: What becomes of what requires a gradient beside the network, as for `DA3Callback`;
            not ``"shared"``, as no domain depends on another.
        seed: The seed with which every domain starts.
        save_every_n_steps: Optimizer steps between two checkpoints, and so about the most that a
            stop can cost: no checkpoint is made between a step and the validation behind it. The
            end of an epoch is saved, too, unless ``max_steps`` limits the Trainer.

    Returns:
        A module whose network has all the domains, none of them active.

    Raises:
        ConfigError: An argument is wrong.
        DomainError: A domain is ill-named, or its name differs from another's by case alone.
        CheckpointError: A file is damaged, of another backbone, or in the way.
        KeyboardInterrupt: The training was interrupted; what was saved is kept.
    """
    domains = DomainFolder(folder)
    config = DA3Config.of(config)
    plans = _checked(tasks, save_every_n_steps, seed)
    _check_outside(outside)
    if "callbacks" in getattr(trainer, "keywords", {}):
        raise ConfigError(
            "`trainer` is a partial that has callbacks of its own, which would be lost. Give a "
            "function: lambda callbacks: L.Trainer(callbacks=[*callbacks, EarlyStopping('loss')])."
        )
    domains.make()
    with tempfile.TemporaryDirectory() as scratch:
        tried = DomainFolder(scratch)  # by ``fast_dev_run``: no file of theirs is to stay
        found = {name: domains for name in plans if _is_finished(domains, name)}
        learned: list[Any] = []
        runs = SequenceRuns(domains.path)
        for name, task in plans.items():
            checkpoint = domains.path / f"{name}.ckpt"
            if name not in found:
                # the steps of all domains cost about the same
                da3 = DA3Callback(
                    name, task.num_classes, config, backbone, predict=not found, outside=outside
                )
                finished = next((found[other].file(other) for other in found), None)
                saver = SequenceCheckpoint(checkpoint, save_every_n_steps, da3, finished)
                learned.clear()
                gc.collect()  # room for the next: a Trainer and its module are full of cycles
                both = (domains, tried)
                *learned, found[name] = _learn(module, task, trainer, both, da3, saver, seed, runs)
            if found[name] is domains:
                _remove(checkpoint)
        lit, model = learned or _converted(module, backbone, config, outside, seed)
        model.set_domain(None)
        for name in model.domains:  # all alike, in the order of the tasks, from their files
            model.delete_domain(name)
        for name in plans:
            found[name].load(model, name)
    return lit


def _checked(
    tasks: Mapping[str, Any], save_every_n_steps: object, seed: object
) -> dict[str, DomainTask]:
    for name, value, least in (("save_every_n_steps", save_every_n_steps, 1), ("seed", seed, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**32:
            raise ConfigError(
                f"`{name}` must be an int, at least {least} and below 2^32, got {shown(value)}."
            )
    if not isinstance(tasks, Mapping):
        raise ConfigError(
            f"`tasks` must be a dict of tasks by the domain's name, got {type(tasks).__name__}."
        )
    if not tasks:
        raise ConfigError("`tasks` is empty: name at least one domain.")
    checked: dict[str, DomainTask] = {}
    for name, task in tasks.items():
        check_name(name)
        check_apart(name, [other for other in checked if other != name])
        if not isinstance(task, tuple) or not 2 <= len(task) <= len(DomainTask._fields):
            raise ConfigError(
                f"The task of domain {name!r} must be a tuple ({', '.join(DomainTask._fields)}), "
                f"the last two optional; got {type(task).__name__}."
            )
        checked[name] = DomainTask(*task)
        if checked[name].num_classes is not None:  # said now, not when its turn has come
            check_num_classes(checked[name].num_classes)
        checked_class_names(checked[name].class_names, checked[name].num_classes)
    return checked


def _check_outside(outside: object) -> None:
    if outside not in ("domain", "frozen"):
        raise ConfigError(
            f'`outside` must be "domain" or "frozen", got {shown(outside)}. Every domain of a '
            'sequence starts from a new module, and its file is all that is kept: for "shared", '
            "learn them in one run, with DA3Callback({...}) and a DomainLoader."
        )


def _is_finished(domains: DomainFolder, name: str) -> bool:
    path = domains.place(name)
    if not check_readable(path, "domain file"):
        return False
    extra = read_domain(path).metadata.get("extra")
    if not isinstance(extra, dict) or extra.get("finished") is not True:
        raise CheckpointError(
            f"{str(path)!r} was not written by a finished `fit_sequence`. Move it away, or give "
            "another folder: the domain would be saved over it."
        )
    return True


def _made(
    make_trainer: Callable[..., L.Trainer], da3: DA3Callback, saver: SequenceCheckpoint
) -> L.Trainer:
    """The user's Trainer, with the callbacks."""
    try:
        trainer = make_trainer(callbacks=[da3, saver])
    except Exception as error:  # of the kind that Lightning raises over wrong arguments
        if "enable_checkpointing=False" not in str(error):
            raise
        raise ConfigError(
            "`trainer` makes a Trainer with enable_checkpointing=False, but `fit_sequence` resumes "
            "from a checkpoint of its own, the only one that is made. Leave the argument out."
        ) from error
    has: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if da3 not in has or saver not in has:
        raise ConfigError(
            "The Trainer does not have the callbacks that `trainer` was called with. Hand them on: "
            "lambda callbacks: L.Trainer(callbacks=callbacks)."
        )
    return trainer


def _learn(
    make_module: Callable[[], L.LightningModule],
    task: DomainTask,
    make_trainer: Callable[..., L.Trainer],
    folders: tuple[DomainFolder, DomainFolder],
    da3: DA3Callback,
    saver: SequenceCheckpoint,
    seed: int,
    runs: SequenceRuns,
) -> tuple[L.LightningModule, DA3Model, DomainFolder]:
    """One domain, to its end; its file is in the last when this returns, the second if tried."""
    domains, tried = folders
    name = da3.domain
    assert isinstance(name, str)  # as `fit_sequence` made it
    for target in (saver.path.name, domains.file(name).name):  # of a process that was killed
        remove_abandoned(domains.path, target, older_than_s=0)
    L.seed_everything(seed, verbose=False)
    lit = make_module()
    trainer = _made(make_trainer, da3, saver)
    trying = trainer.fast_dev_run  # type: ignore[attr-defined]
    domains = tried if trying else domains
    runs.begin(trainer.loggers, name)
    da3.tracking.logs_domains = False  # its file is finished later
    ckpt_path = str(saver.path) if not trying and _is_resumable(saver.path) else None
    with saver.watching(trainer, task.train) as data:
        trainer.fit(lit, ckpt_path=ckpt_path, val_dataloaders=task.val, **data)
    if trainer.interrupted:
        raise KeyboardInterrupt
    model = da3.model
    assert model is not None
    model.domain(name).class_names = checked_class_names(task.class_names, task.num_classes)
    if trainer.is_global_zero or trying:  # every process has a scratch folder of its own
        metrics = finite(trainer.callback_metrics) or saver.metrics
        path = domains.save(model, name, finished=True, metrics=metrics)
        runs.end(trainer.loggers, path, name)
    trainer.strategy.barrier()
    return lit, model, domains


def _is_resumable(path: Path) -> bool:
    """Whether there is a checkpoint; one that a pickle would be needed for is refused."""
    if not check_readable(path, "checkpoint"):
        return False
    try:
        check_checkpoint(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # of many kinds over a bad file
        raise CheckpointError(
            f"Cannot read the checkpoint {str(path)!r} ({error}). Delete it to learn the domain "
            "from its beginning."
        ) from error
    return True


def _remove(checkpoint: Path) -> None:
    try:
        checkpoint.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"Cannot remove the checkpoint {str(checkpoint)!r} of a finished domain: {error}. "
            "Remove it."
        ) from error


def _converted(
    make_module: Callable[[], L.LightningModule],
    backbone: str | None,
    config: DA3Config | None,
    outside: str,
    seed: int,
) -> tuple[L.LightningModule, DA3Model]:
    """A module with its network converted, without a Trainer."""
    L.seed_everything(seed, verbose=False)
    lit = make_module()
    lit.setup("fit")
    lit.configure_model()
    name = find_backbone(lit, backbone)
    network = lit.get_submodule(name)
    model = convert(network, config)
    hold_(lit, name, model, outside)
    put_(lit, network, model)
    return lit, model
