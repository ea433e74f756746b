"""Folders for files."""

from __future__ import annotations

from pathlib import Path

from lightning_da3.errors import CheckpointError


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, if it is missing.

    Raises:
        CheckpointError: It cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"Cannot make the folder {str(path)!r}: {error}.") from error
