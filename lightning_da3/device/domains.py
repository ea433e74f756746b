"""Domains on a device: read for an exported file, and written for where PyTorch is."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning_da3.device.session import Array, Port, Session
from lightning_da3.errors import CheckpointError
from lightning_da3.files.content import Content, read_content, write_content
from lightning_da3.files.fitting import config_differences
from lightning_da3.files.stored import Stored

CHECKPOINT = "fit"  # key of the metadata of what `Learner.fit` goes on from
_SAME = ("backbone", "architecture", "plan")


def read_domain_for(
    session: Session, path: str | os.PathLike[str], names: Sequence[str]
) -> Content:
    """A domain file that fits an exported one.

    Args:
        session: The exported file.
        path: The domain's.
        names: Those of its tensors that the exported file takes.

    Raises:
        CheckpointError: It is missing or damaged, or was learned with another model.
    """
    found = read_content(path)
    if CHECKPOINT in found.metadata:
        raise CheckpointError(
            f"{os.fspath(path)!r} is no domain file, but the checkpoint of a fit. "
            "`Learner.fit(..., checkpoint=...)` goes on from it."
        )
    check_fits(found, path, session, names)
    return found


def check_fits(
    found: Content, path: str | os.PathLike[str], session: Session, names: Sequence[str]
) -> None:
    """Refuse what does not fit an exported file.

    Args:
        found: What a file holds.
        path: That file.
        session: The exported file.
        names: Those of the tensors that the exported file takes.

    Raises:
        CheckpointError: It was learned with another model, or tensors are missing or others.
    """
    ports = {name: session.inputs[name] for name in names}
    problems = [*_others(found.metadata, session.manifest), *_misfits(found.tensors, ports)]
    if problems:
        raise CheckpointError(
            f"The domain file {os.fspath(path)!r} does not fit {session.path!r}: "
            f"{' '.join(problems)}"
        )


def check_same_model(one: Session, other: Session) -> None:
    """Refuse two exported files of different models.

    Raises:
        CheckpointError: They are.
    """
    problems = [*_others(other.manifest, one.manifest)]
    if problems:
        raise CheckpointError(
            f"{other.path!r} and {one.path!r} are of two models: {' '.join(problems)}"
        )


def write_domain_of(
    start: Content, learned: Mapping[str, Array], path: str | os.PathLike[str], extra: Any
) -> None:
    """Write a domain with what was learned, whole or not at all.

    Args:
        start: What it began with.
        learned: Arrays that take the place of its tensors.
        path: The file; its folder must exist.
        extra: What JSON can hold.

    Raises:
        CheckpointError: It cannot be written, or holds NaN; a file that was there stays.
    """
    tensors = start.tensors | {name: Stored.of(array) for name, array in learned.items()}
    write_content(path, tensors.items(), {**start.metadata, "extra": extra})


def _others(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> Iterator[str]:
    """What two files say of different models."""
    for key in _SAME:
        if theirs.get(key) != mine[key]:
            yield (
                f"It is of another {key} ({theirs.get('network')}, {str(theirs.get(key))[:12]}; "
                f"here {mine['network']}, {mine[key][:12]}). Export both from one model."
            )
            return
    configs = [about.get("config") or {} for about in (theirs, mine)]
    if configs[0].get("version") != configs[1].get("version"):
        yield (
            "It is of another version of lightning_da3. Load it into a model where PyTorch is, and "
            "save it anew."
        )
    yield from config_differences(*configs)


def _misfits(tensors: Mapping[str, Stored], ports: Mapping[str, Port]) -> Iterator[str]:
    """What tensors and inputs have not in common."""
    if lacking := sorted(set(ports) - set(tensors)):
        yield f"It lacks {lacking}."
    for name in sorted(set(ports) & set(tensors)):
        found, port = tensors[name], ports[name]
        if found.shape != port.shape or found.dtype != port.dtype:
            yield (
                f"{name!r} has the shape {found.shape} and is of {found.dtype}, not {port.shape} "
                f"and {port.dtype}."
            )
