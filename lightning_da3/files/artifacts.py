"""Domains from artifacts of Weights & Biases: ``wandb:entity/project/name:alias`` as a path."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_da3.errors import CheckpointError

PREFIX = "wandb:"


@contextlib.contextmanager
def local_file(path: str | os.PathLike[str]) -> Iterator[str | os.PathLike[str]]:
    """The file that a path names; one of an artifact is there while the block runs.

    A W&B run that is open uses the artifact, so that its lineage shows where the domain is from.

    Args:
        path: Of a file, or ``wandb:`` and the name of an artifact with its alias or version, such
            as ``wandb:entity/project/name:best``.

    Raises:
        CheckpointError: The artifact cannot be had, or has not one domain file.
        ModuleNotFoundError: It takes wandb, which is not installed.
    """
    if not (isinstance(path, str) and path.startswith(PREFIX)):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        yield _downloaded(path, Path(folder))


def _downloaded(path: str, folder: Path) -> Path:
    name = path.removeprefix(PREFIX)
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path!r} names an artifact, and wandb is not installed: "
            "pip install 'lightning-da3[wandb]'."
        ) from error
    try:
        _artifact(wandb, name).download(root=str(folder))
    except Exception as error:  # of many kinds: of the network, of names, of permissions
        raise CheckpointError(
            f"Cannot load {path!r}: {error}. Name an artifact as in "
            "'wandb:entity/project/name:best'; `wandb login` says who you are."
        ) from error
    found = sorted(folder.rglob("*.safetensors"))
    if len(found) != 1:
        raise CheckpointError(
            f"{path!r} must hold one domain file, but holds {[file.name for file in found]}. Name "
            "an artifact that `lightning_da3.trainer.loggers.log_domain` logged."
        )
    return found[0]


def _artifact(wandb: Any, name: str) -> Any:
    """The artifact, used by the run that is open; one that is offline cannot use any."""
    run = wandb.run
    if run is None or run.offline:
        return wandb.Api().artifact(name)
    return run.use_artifact(name)
