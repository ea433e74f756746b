"""What goes to a Trainer's logger beside metrics: pictures, domains, tables, headline numbers.

Every function takes any Lightning logger and does what that logger can: Weights & Biases gets its
own media, TensorBoard its figures, every other logger a file in its folder. Under DDP only rank
zero writes. A `DA3Callback` calls them by itself (`lightning_da3.trainer.tracking`).
"""

from __future__ import annotations

import csv
import os
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor

from lightning_da3.files.domain_file import read_domain
from lightning_da3.files.folder import SUFFIX
from lightning_da3.files.folders import make_folder
from lightning_da3.passes.hosts import host_key
from lightning_da3.planning.plan import NodePlan, Plan
from lightning_da3.plotting.memory import plot_step
from lightning_da3.plotting.places import flat, place_of
from lightning_da3.trainer.first_steps import FirstSteps
from lightning_da3.trainer.lightning_private import name_run_

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = ("place", "layer", "action", "keeps", "saved_activation_bytes")
_MOST_LETTERS = 128  # of an artifact's name


@rank_zero_only
def log_figure(logger: Any, name: str, figure: Figure, step: int | None = None) -> None:
    """Log a picture.

    Args:
        logger: W&B: an image; TensorBoard: a figure; any other: ``<name>.png`` in its folder.
        name: The name of the picture; a ``/`` becomes a ``-`` in file names.
        figure: A matplotlib figure, as `lightning_da3.plotting` makes them.
        step: The training step, or None if the picture belongs to none.
    """
    if is_wandb(logger):
        logger.log_image(key=name, images=[figure], step=step)
    elif _is(logger, "TensorBoardLogger"):
        logger.experiment.add_figure(name, figure, global_step=step, close=False)
    else:
        figure.savefig(_file(logger, f"{name}.png"))


def log_first_steps(logger: Any, steps: FirstSteps | None, name: str = "memory_of_a_step") -> None:
    """Log a picture of a training step's memory, as it was predicted and as it was measured.

    Args:
        logger: As `log_figure` takes it.
        steps: `DA3Callback.first_steps`, after a fit. Without a prediction there is no picture.
        name: The name of the picture.
    """
    if steps is not None and steps.predicted is not None:
        figure = plot_step(
            steps.predicted,
            measured_peak_bytes=steps.peak_bytes,
            measured_saved_bytes=steps.saved_activation_bytes,
        )
        log_figure(logger, name, figure)


@rank_zero_only
def log_histogram(
    logger: Any, name: str, values: Tensor, figure: Figure, step: int | None = None
) -> None:
    """Log how often which value occurs.

    Args:
        logger: W&B and TensorBoard: a histogram of their own; any other: the picture, as a file.
        name: Its name.
        values: The values, of any shape.
        figure: A picture of them.
        step: As for `log_figure`.
    """
    values = values.flatten()
    if is_wandb(logger):
        import wandb

        logger.log_metrics({name: wandb.Histogram(values.tolist())}, step)
    elif _is(logger, "TensorBoardLogger"):
        logger.experiment.add_histogram(name, values, global_step=step)
    else:
        log_figure(logger, name, figure, step)


@rank_zero_only
def log_domain(
    logger: Any,
    path: str | os.PathLike[str],
    domain: str,
    metadata: Mapping[str, Any] | None = None,
    *,
    best: bool = True,
) -> None:
    """Log a domain's file as a W&B artifact of type ``domain``; other loggers do nothing.

    It is named by `artifact_name`. Its aliases are ``latest`` and ``best``. Its metadata are the
    file's own, beside them the ``fingerprint`` of the backbone that it belongs to, the ``metrics``
    that it was saved with and ``file_bytes``, and what is given here. `load_domain` of
    ``"wandb:entity/project/name:best"`` loads it.

    Args:
        logger: Any Lightning logger.
        path: A file that `DA3Model.save_domain` wrote.
        domain: Its name.
        metadata: Anything JSON holds, such as accuracies.
        best: Whether it is the best of this name so far.

    Raises:
        CheckpointError: The file is damaged or foreign.
    """
    if not is_wandb(logger):
        return
    import wandb  # its logger could not have been made without it

    own, run = read_domain(path).metadata, logger.experiment
    about = {
        **own,
        "fingerprint": own.get("backbone"),
        "metrics": (own.get("extra") or {}).get("metrics", {}),
        "file_bytes": Path(path).stat().st_size,
        **(metadata or {}),
    }
    named = artifact_name(run.project, own, domain)
    artifact = wandb.Artifact(named, type="domain", metadata=about)
    artifact.add_file(os.fspath(path), name=f"{domain}{SUFFIX}")
    run.log_artifact(artifact, aliases=["latest", "best"] if best else ["latest"])


def artifact_name(project: str, about: Mapping[str, Any], domain: str) -> str:
    """The name of a domain's artifact: ``<project>-<network>-<backbone>-<domain>``.

    The backbone is the first 8 digits of its fingerprint: domains of different backbones are no
    versions of each other.

    Args:
        project: Of the W&B run.
        about: The metadata of the domain's file.
        domain: Its name.
    """
    parts = [project, about.get("network"), str(about.get("backbone", ""))[:8]]
    named = "-".join(str(part) for part in parts if part)
    room = _MOST_LETTERS - len(domain) - 1
    return f"{re.sub(r'[^A-Za-z0-9_.-]', '_', named)[:room]}-{domain}"


@rank_zero_only
def log_table(
    logger: Any, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]
) -> None:
    """Log a table.

    Args:
        logger: W&B: a table; any other: ``<name>.csv`` in its folder.
        name: Its name.
        columns: The names of its columns.
        rows: Its rows.
    """
    if is_wandb(logger):
        logger.log_table(key=name, columns=list(columns), data=[list(row) for row in rows])
        return
    with _file(logger, f"{name}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


def log_plan_table(
    logger: Any, plan: Plan, by_module: Mapping[str, int], name: str = "memory_by_layer"
) -> None:
    """Log what becomes of every layer, and what each keeps for the backward pass.

    Args:
        logger: W&B: a table; any other: ``<name>.csv`` in its folder.
        plan: The plan of the converted network.
        by_module: `SavedActivations.by_module` of the converted network, or of what holds it.
        name: The name of the table.
    """
    log_table(logger, name, COLUMNS, plan_rows(plan, by_module))


@rank_zero_only
def log_summary(logger: Any, values: Mapping[str, float]) -> None:
    """Log headline numbers: the summary of a W&B run, a row of metrics anywhere else.

    Args:
        logger: Any Lightning logger.
        values: By name.
    """
    if is_wandb(logger):
        logger.experiment.summary.update(dict(values))
    else:
        logger.log_metrics(dict(values))
        logger.save()


def plan_rows(plan: Plan, by_module: Mapping[str, int]) -> list[list[Any]]:
    """The rows of `log_plan_table`: every layer, every host's adapter, the head and the rest.

    Their bytes add up to those of `by_module`.

    Args:
        plan: The plan of the converted network.
        by_module: Bytes by module of the converted network, or of what holds it.
    """
    layers = {flat(node.place): _row(node.place, *_about(node)) for node in plan.nodes}
    hosts = {flat(host_key(host.name)): _row(host.name, "adapter", "add") for host in plan.hosts}
    head, elsewhere = _row("head", "domain's own", "replace"), _row("elsewhere")
    rows = {"layer": layers, "host": hosts, "head": {"head": head}}
    for name, count in by_module.items():
        place = place_of(name)
        row = rows.get(place.kind, {}).get(place.name, elsewhere)
        row[-1] += count
    return [*layers.values(), *hosts.values(), head, elsewhere]


def _about(node: NodePlan) -> tuple[str, str, str]:
    return node.layer, node.action, node.keeps


def _row(place: str, layer: str = "", action: str = "", keeps: str = "") -> list[Any]:
    return [place, layer, action, keeps, 0]


class SequenceRuns:
    """W&B's runs of domains that are learned one after the other, in one group.

    A domain whose Trainer has a logger of its own has a run of its own, whose job type is the
    domain's name; the run before it is finished, or the new logger would go on with that. A logger
    that several Trainers share has one run.

    Args:
        folder: The sequence's folder, which names the group: the same when it is resumed.
    """

    def __init__(self, folder: Path) -> None:
        folder = folder.resolve()
        self.group = f"{folder.name}-{zlib.crc32(os.fsencode(folder)):08x}"
        self._runs: list[Any] = []

    def begin(self, loggers: Iterable[Any], domain: str) -> None:
        """A domain is about to be learned.

        Args:
            loggers: Of its Trainer.
            domain: Its name.
        """
        trackers = [logger for logger in loggers if is_wandb(logger)]
        begins = [name_run_(logger, group=self.group, job_type=domain) for logger in trackers]
        if any(begins):
            while self._runs:
                self._runs.pop().finish()

    @rank_zero_only
    def end(self, loggers: Iterable[Any], path: Path, domain: str) -> None:
        """It was learned: log its finished file.

        Args:
            loggers: Of its Trainer.
            path: The file.
            domain: Its name.
        """
        trackers = {id(logger.experiment): logger for logger in loggers if is_wandb(logger)}
        for logger in trackers.values():
            with Forgiving("domains", set()):
                log_domain(logger, path, domain)
        self._runs = [logger.experiment for logger in trackers.values()]


def is_wandb(logger: Any) -> bool:
    """Whether a logger is W&B's."""
    return _is(logger, "WandbLogger")


def takes_pictures(logger: Any) -> bool:
    """Whether pictures have a place beside what a logger writes."""
    return any(_is(logger, kind) for kind in ("WandbLogger", "TensorBoardLogger", "CSVLogger"))


class Forgiving(AbstractContextManager["Forgiving", bool]):
    """Lets what is logged fail in its block: says so, and training goes on.

    Args:
        what: What is logged.
        told: What was said before, which is not said again.
    """

    def __init__(self, what: str, told: set[str]) -> None:
        self._what, self._told = what, told

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if not isinstance(error, Exception):
            return False
        if self._what not in self._told:
            self._told.add(self._what)
            reason = f"{type(error).__name__}: {error}"
            rank_zero_warn(f"Could not log {self._what}: {reason}. Training goes on without.")
        return True


def _is(logger: Any, kind: str) -> bool:
    """By name: a logger of the older `pytorch_lightning` package is as good."""
    return any(cls.__name__ == kind for cls in type(logger).__mro__)


def _file(logger: Any, name: str) -> Path:
    folder = Path(getattr(logger, "log_dir", None) or getattr(logger, "save_dir", None) or ".")
    return make_folder(folder) / name.replace("/", "-")
