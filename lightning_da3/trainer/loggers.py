"""What goes to a Trainer's logger beside metrics: pictures, domains, tables, headline numbers.

Every function takes any Lightning logger and does what that logger can: Weights & Biases gets its
own media, TensorBoard its figures, every other logger a file in its folder. Under DDP only rank
zero writes.

Curves of several domains in one W&B run do not overlap if every domain has its own prefix::

    run = WandbLogger(project="domains").experiment
    trainer = Trainer(logger=WandbLogger(experiment=run, prefix="flowers"), callbacks=[...])
"""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_only

from lightning_da3.files.domain_file import read_domain
from lightning_da3.files.folders import make_folder
from lightning_da3.passes.hosts import host_key
from lightning_da3.planning.plan import NodePlan, Plan
from lightning_da3.plotting.memory import plot_step
from lightning_da3.plotting.places import flat, place_of
from lightning_da3.trainer.first_steps import FirstSteps

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = ("place", "layer", "action", "keeps", "saved_activation_bytes")


@rank_zero_only
def log_figure(logger: Any, name: str, figure: Figure, step: int | None = None) -> None:
    """Log a picture.

    Args:
        logger: W&B: an image; TensorBoard: a figure; any other: ``<name>.png`` in its folder.
        name: The name of the picture; a ``/`` becomes a ``-`` in file names.
        figure: A matplotlib figure, as `lightning_da3.plotting` makes them.
        step: The training step, or None if the picture belongs to none.
    """
    if _is(logger, "WandbLogger"):
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
def log_domain(
    logger: Any,
    path: str | os.PathLike[str],
    domain: str,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Log a domain's file as a W&B artifact of type ``domain``; other loggers do nothing.

    Its aliases are ``latest`` and the domain's name. Its metadata are the file's own, with the
    fingerprint of the backbone that it belongs to, and what is given here.

    Args:
        logger: Any Lightning logger.
        path: A file that `DA3Model.save_domain` wrote.
        domain: Its name, which becomes the artifact's.
        metadata: Anything JSON holds, such as accuracies.

    Raises:
        CheckpointError: The file is damaged or foreign.
    """
    if not _is(logger, "WandbLogger"):
        return
    import wandb  # its logger could not have been made without it

    about = {**read_domain(path).metadata, **(metadata or {})}
    artifact = wandb.Artifact(domain, type="domain", metadata=about)
    artifact.add_file(os.fspath(path), name=Path(path).name)
    logger.experiment.log_artifact(artifact, aliases=["latest", domain])


@rank_zero_only
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
    rows = plan_rows(plan, by_module)
    if _is(logger, "WandbLogger"):
        logger.log_table(key=name, columns=list(COLUMNS), data=rows)
        return
    with _file(logger, f"{name}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(rows)


@rank_zero_only
def log_summary(logger: Any, values: Mapping[str, float]) -> None:
    """Log headline numbers: the summary of a W&B run, a row of metrics anywhere else.

    Args:
        logger: Any Lightning logger.
        values: By name.
    """
    if _is(logger, "WandbLogger"):
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


def _is(logger: Any, kind: str) -> bool:
    """By name: a logger of the older `pytorch_lightning` package is as good."""
    return any(cls.__name__ == kind for cls in type(logger).__mro__)


def _file(logger: Any, name: str) -> Path:
    folder = Path(getattr(logger, "log_dir", None) or getattr(logger, "save_dir", None) or ".")
    return make_folder(folder) / name.replace("/", "-")
