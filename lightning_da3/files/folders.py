"""Makes folders for files."""

from __future__ import annotations

from pathlib import Path

from lightning_da3.errors import CheckpointError


def make_folder(path: Path) -> Path:
    """Make a folder, and those that it lies in, unless it is there.

    Args:
        path: The folder.

    Returns:
        The folder.

    Raises:
        CheckpointError: It cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a path that no system could have
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"Cannot make the folder {str(path)!r}: {reason}. Check its path and permissions."
        ) from error
    return path
