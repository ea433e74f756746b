"""What is finished, one line of JSON each, in a file that is whole at any moment."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from comparison.input_errors import InputError

Key = tuple[str, ...]  # stage, method, and what else tells one piece of work from another


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file, or leaves the one before as it was.

    Raises:
        InputError: There is no room, or no permission.
    """
    partial = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        _remove(partial)
        raise InputError(
            f"{path} cannot be written ({error.strerror}): make room or give another --output. "
            "What was finished before is kept; the same command goes on from there."
        ) from error


class Records:
    """Finished work by its key.

    Args:
        path: A file of JSON lines, the first of which holds the settings.
        settings: What results depend on; other settings are other results.
        fresh: Forget what an earlier run finished.

    Raises:
        InputError: The file was made with other settings, or is no such file.
    """

    def __init__(self, path: Path, settings: dict[str, Any], *, fresh: bool = False) -> None:
        self.path, self.settings = path, settings
        self._done: dict[Key, dict[str, Any]] = {}
        if path.exists() and not fresh:
            self._read()

    def __len__(self) -> int:
        return len(self._done)

    def __contains__(self, key: Key) -> bool:
        return key in self._done

    def __getitem__(self, key: Key) -> dict[str, Any]:
        return self._done[key]

    def get(self, *key: str) -> dict[str, Any] | None:
        return self._done.get(key)

    def add(self, key: Key, values: dict[str, Any]) -> None:
        """Keeps what is finished, on disk before it returns."""
        done = {**self._done, key: values}
        lines = [self.settings, *({"key": list(k), **v} for k, v in done.items())]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_whole(self.path, text.encode())
        self._done = done

    def _read(self) -> None:
        try:
            settings, *lines = map(json.loads, self.path.read_text().splitlines())
            done = {tuple(line.pop("key")): line for line in lines}
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise InputError(
                f"{self.path} is no file of this command: remove it, or give another --output."
            ) from error
        if settings != self.settings:
            names = sorted(
                n for n in {*settings, *self.settings} if settings.get(n) != self.settings.get(n)
            )
            was = ", ".join(f"{n}={settings.get(n)!r}" for n in names)
            now = ", ".join(f"{n}={self.settings.get(n)!r}" for n in names)
            raise InputError(
                f"{self.path} was made with {was}, this run has {now}: give the same options, "
                "another --output, or --fresh to begin anew."
            )
        self._done = done


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return  # it tells nothing that the first error did not
