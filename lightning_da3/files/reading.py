"""A file to read, if it is one: nothing is waited for, and nothing else is touched."""

from __future__ import annotations

import os
import stat
from io import BufferedReader
from pathlib import Path

from lightning_da3.errors import CheckpointError


def open_regular(path: str | os.PathLike[str]) -> BufferedReader:
    """Open a file, but no pipe, which would be waited for, and no device, which may never end.

    Args:
        path: The file, or a link to it.

    Raises:
        CheckpointError: It is something else.
        OSError: The system cannot open it.
        ValueError: No system has such a path.
    """
    _check(Path(path).stat())  # before: to open a device may be to use it
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    try:
        _check(os.fstat(descriptor))  # after: what is there may be another by now
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _check(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
        raise CheckpointError(f"it is {kind}. Give the path of a file.")


def check_readable(path: str | os.PathLike[str], what: str) -> bool:
    """Whether there is a file that can be read.

    Args:
        path: The file.
        what: What it should be, for the error.

    Returns:
        False where nothing is.

    Raises:
        CheckpointError: There is something else, or it cannot be opened.
    """
    try:
        open_regular(path).close()
    except FileNotFoundError:
        if not os.path.lexists(path):
            return False
        problem: object = "it is a link to nothing. Remove it."
    except CheckpointError as error:
        problem = error
    except (OSError, ValueError) as error:
        problem = f"{getattr(error, 'strerror', None) or error}. Check its path and permissions."
    else:
        return True
    raise CheckpointError(f"Cannot read the {what} {str(path)!r}: {problem}")
