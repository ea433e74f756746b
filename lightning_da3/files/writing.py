"""A file made whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_da3.errors import CheckpointError
from lightning_da3.files.reading import open_regular

try:
    import fcntl
except ImportError:
    LOCKS: Any = None  # Windows, where a file that is open cannot be removed
else:
    LOCKS = fcntl

_TEMPORARY = re.compile(r"\.(?P<target>.+)\.[0-9a-f]{32}\.tmp")
ABANDONED_AFTER_S = 3600.0


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A file to write in a ``with`` block that takes the place of `target` at its end, or never.

    What writers that were killed left in the folder is removed, once it is an hour old.

    Args:
        target: Where the file goes; its folder must exist.

    Yields:
        Path of an empty file beside it, to be written. An error in the block removes it; a process
        that is killed leaves it behind, as ``.<name>.<32 hexadecimal digits>.tmp``.

    Raises:
        OSError: The system could not write it; what was at `target` is still there.
    """
    remove_abandoned(target.parent)
    # in the same folder: a rename is atomic only inside one file system
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    with _held(temporary):
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


def remove_abandoned(
    folder: Path, target: str | None = None, older_than_s: float = ABANDONED_AFTER_S
) -> None:
    """Remove what writers that were killed left behind.

    A living writer holds a lock on its file, which ends with its process, however that ends. The
    age is for file systems that know no locks, and for the moment between a file and its lock.

    Args:
        folder: Where to look.
        target: Only files on their way to this name; None: to any.
        older_than_s: Seconds since the file was last written.
    """
    with contextlib.suppress(OSError, ValueError):
        for path in list(folder.iterdir()):
            match = _TEMPORARY.fullmatch(path.name)
            if match and target in (None, match["target"]):
                with contextlib.suppress(OSError, CheckpointError):  # or another was quicker
                    _remove_abandoned(path, older_than_s)


def _remove_abandoned(path: Path, older_than_s: float) -> None:
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode) or time.time() - status.st_mtime < older_than_s:
        return
    with open_regular(path) as file:
        if LOCKS is not None:
            LOCKS.flock(file, LOCKS.LOCK_SH | LOCKS.LOCK_NB)  # raises where a writer holds it
    path.unlink()


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    """A new, empty file that is locked in the block, where the system can."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    if LOCKS is None:
        os.close(descriptor)
        yield
        return
    try:
        with contextlib.suppress(OSError):  # of file systems without locks
            LOCKS.flock(descriptor, LOCKS.LOCK_EX | LOCKS.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
