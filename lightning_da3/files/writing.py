"""A file made whole or not at all."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A file to write in a ``with`` block that takes the place of `target` at its end, or never.

    Args:
        target: Where the file goes; its folder must exist.

    Yields:
        Path of a file beside it, which the block makes. An error in the block removes it; a process
        that is killed leaves it behind, as ``.<name>.<32 hexadecimal digits>.tmp``.

    Raises:
        OSError: The system could not write it; what was at `target` is still there.
    """
    # in the same folder: a rename is atomic only inside one file system
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())  # or a power cut could leave the new name on empty blocks
        os.replace(temporary, target)  # noqa: PTH105 - the one call that tests make fail
    finally:
        temporary.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not every system can sync a folder
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
