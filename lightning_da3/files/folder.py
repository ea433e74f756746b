"""A folder of domain files, with an index of what they say that can always be made again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Protocol

from lightning_da3.errors import CheckpointError, DomainError
from lightning_da3.files.domain_file import read_domain
from lightning_da3.files.folders import make_folder
from lightning_da3.files.names import check_apart, check_name
from lightning_da3.files.reading import open_regular
from lightning_da3.files.writing import replacing

INDEX = "index.json"
INDEX_VERSION = 1
SUFFIX = ".safetensors"

_MOST_INDEX_BYTES = 2**26  # what is longer is made again from the files

_Entry = dict[str, Any]


class HasDomains(Protocol):
    """What is used here of a DA3Model."""

    def save_domain(self, name: str, path: str | os.PathLike[str], **metadata: Any) -> None:
        """Write one domain to a file."""

    def load_domain(self, path: str | os.PathLike[str], name: str | None = None) -> str:
        """Add the domain of a file."""


class DomainFolder:
    """Domains as ``<name>.safetensors`` in one folder.

    The files are the truth. ``index.json`` repeats what they say, for a quick look at many: an
    entry is used only while its file is the one that it was made from; the rest, or an index that
    is missing or damaged, is read from the files again. A file that was renamed is a domain of its
    new name. Names that differ by case alone are kept from meeting: on many systems they would be
    one file.

    Args:
        path: The folder; it is made when the first domain is saved.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def file(self, name: str) -> Path:
        """Where a domain of this name is, or would be.

        Raises:
            DomainError: The name is ill-formed.
        """
        check_name(name)
        return self.path / f"{name}{SUFFIX}"

    def save(self, model: HasDomains, name: str, **metadata: Any) -> Path:
        """Write one domain of `model`, whole or not at all.

        Args:
            model: The `DA3Model` that has the domain.
            name: The domain's name.
            metadata: Anything JSON holds that should lie with it, such as metrics.

        Returns:
            The path of its file.

        Raises:
            DomainError: There is no such domain, or another's name differs by case alone.
            CheckpointError: It cannot be written; a file that was there stays.
        """
        self.file(name)  # an ill-formed name makes no folder
        self.make()
        path = self.place(name)
        model.save_domain(name, path, **metadata)
        self.index()
        return path

    def place(self, name: str) -> Path:
        """Where a domain of this name may be written.

        Raises:
            DomainError: The name is ill-formed, or differs from another's by case alone.
            CheckpointError: The folder cannot be read.
        """
        path = self.file(name)
        check_apart(name, [file.stem for file in self._files()])
        return path

    def make(self) -> None:
        """Make the folder if it is missing.

        Raises:
            CheckpointError: It cannot be made.
        """
        make_folder(self.path)

    def load(self, model: HasDomains, name: str) -> None:
        """Add a domain of this folder to `model`; its file is read and checked.

        Raises:
            DomainError: The folder has no such file, or `model` has a domain of that name.
            CheckpointError: The file is damaged, or was made for another backbone or config.
        """
        path = self.file(name)
        # looked for among the names: some systems would find "a" under "A"
        if name not in [file.stem for file in self._files()]:
            raise DomainError(
                f"There is no domain {name!r} in {str(self.path)!r}. There are {self.names()}."
            )
        model.load_domain(path, name)

    def names(self) -> list[str]:
        """The names of the domains whose files are good, sorted."""
        return [name for name, entry in self.index().items() if "error" not in entry]

    def damaged(self) -> dict[str, str]:
        """What is wrong with all other files, by file name without its ending."""
        return {name: entry["error"] for name, entry in self.index().items() if "error" in entry}

    def index(self) -> dict[str, _Entry]:
        """What the files say, by domain name: ``num_classes``, ``class_names``, ``extra``...

        A file that cannot be used has only an ``error``.

        Raises:
            CheckpointError: The folder cannot be read.
        """
        return self._index(self._indexed())

    def rebuild_index(self) -> dict[str, _Entry]:
        """Read every file anew; returns what `index` does."""
        return self._index({})

    def _index(self, before: dict[str, _Entry]) -> dict[str, _Entry]:
        now: dict[str, _Entry] = {}
        for path in self._files():
            stamp = _stamp(path)
            if stamp is None and not os.path.lexists(path):
                continue  # deleted since the folder was listed
            entry = before.get(path.stem)
            about = None
            if stamp is not None and isinstance(entry, dict) and entry.get("stamp") == stamp:
                about = entry.get("about")
            if not isinstance(about, dict) or "error" in about:  # which may have been remedied
                about = _about(path)
            now[path.stem] = {"stamp": stamp, "about": about}
        if now != before:
            self._write(now)
        return {name: entry["about"] for name, entry in now.items()}

    def _files(self) -> list[Path]:
        try:
            return sorted(
                path
                for path in self.path.iterdir()
                if path.suffix == SUFFIX and not path.name.startswith(".")
            )
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:  # ValueError: a path that no system could have
            raise CheckpointError(
                f"Cannot read the folder {str(self.path)!r}: "
                f"{getattr(error, 'strerror', None) or error}. Check its path and permissions."
            ) from error

    def _indexed(self) -> dict[str, _Entry]:
        try:
            with open_regular(self.path / INDEX) as file:
                text = file.read(_MOST_INDEX_BYTES + 1)
            index = json.loads(text) if len(text) <= _MOST_INDEX_BYTES else {}
            good = index["version"] == INDEX_VERSION
            domains = index["domains"] if good else {}
            return domains if isinstance(domains, dict) else {}
        except (CheckpointError, OSError, ValueError, KeyError, TypeError, RecursionError):
            return {}  # it is made again

    def _write(self, domains: dict[str, _Entry]) -> None:
        try:
            with replacing(self.path / INDEX) as temporary:
                temporary.write_text(json.dumps({"version": INDEX_VERSION, "domains": domains}))
        except OSError:
            return  # a read-only folder has no index, and is as good without one


def _stamp(path: Path) -> list[int] | None:
    """Another one for every file that was ever written here; None where the system tells none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_ino, status.st_size, status.st_mtime_ns]


def _about(path: Path) -> _Entry:
    try:
        check_name(path.stem)
        return read_domain(path).metadata
    except (CheckpointError, DomainError) as error:
        return {"error": str(error)}
