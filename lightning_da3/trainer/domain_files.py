"""The files of the domains that a run learns, kept up to date, and those of earlier runs."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_da3.errors import CheckpointError, ConfigError, DA3Error
from lightning_da3.files.domain_file import read_domain
from lightning_da3.files.folder import SUFFIX, DomainFolder
from lightning_da3.files.names import check_apart
from lightning_da3.files.reading import check_readable
from lightning_da3.files.writing import replacing
from lightning_da3.model.identity import check_identity
from lightning_da3.model.model import DA3Model
from lightning_da3.trainer.figures import finite

MODES = ("min", "max")


class DomainFiles:
    """``<domain>.safetensors`` for every domain of a run, in one folder.

    A file is replaced by an epoch that is at least as good as what it says of itself. While a fit
    runs, what it had found is ``<domain>.safetensors.previous``; a fit that fails puts that back,
    and leaves its own last file as ``<domain>.safetensors.unfinished``.

    Args:
        folder: The folder, or None to save nothing.
        domains: The names of the domains.
        monitor: The metric that tells epochs apart, or what its name begins with where it is logged
            as ``<monitor>/<domain>``; None: the last is the best.
        mode: ``"min"`` if less of it is better, or ``"max"``.

    Raises:
        ConfigError: `mode` is neither, or a metric is monitored for nothing.
        DomainError: Names differ by case alone.
    """

    def __init__(
        self,
        folder: str | None,
        domains: Iterable[str] = (),
        monitor: str | None = None,
        mode: str = "min",
    ) -> None:
        if mode not in MODES:
            raise ConfigError(f"`mode` must be one of {MODES}, got {mode!r}.")
        if monitor is not None and folder is None:
            raise ConfigError(
                f"`monitor` is {monitor!r}, but nothing is saved: give a `save_dir`, too."
            )
        self.folder = None if folder is None else Path(folder)
        self.domains, self.monitor, self.mode = list(domains), monitor, mode
        if folder is not None:
            for domain in self.domains:
                check_apart(domain, [other for other in self.domains if other != domain])
        self._active = False  # while a fit runs that saves
        self._writes = False  # this process is the one that does
        self._best: dict[str, float | None] = {}  # of each domain's file
        self._own: set[str] = set()  # domains whose file this fit has written
        self._seen: dict[str, Any] = {}  # the monitored value of an epoch before, by domain
        self._pending = False  # an epoch has ended whose monitored value is not there yet

    def path(self, domain: str) -> Path | None:
        """The file of a domain; None if nothing is saved."""
        return None if self.folder is None else self.folder / f"{domain}{SUFFIX}"

    def wrote(self, domain: str) -> bool:
        """Whether a domain's file is of the last fit, not of an earlier one."""
        return domain in self._own

    def check(self) -> None:
        """Refuse a folder in which the domains cannot be saved, before anything is learned.

        Raises:
            CheckpointError: It cannot be made or read, or something is in the way.
            DomainError: It has another domain whose name differs by case alone.
        """
        if self.folder is not None:
            domains = DomainFolder(self.folder)
            domains.make()
            for domain in self.domains:
                check_readable(domains.place(domain), "domain file")

    def begin(self, model: DA3Model, *, resumed: bool, write: bool) -> None:
        """A fit begins.

        Args:
            model: Has the domains.
            resumed: It goes on with an earlier one, which was stopped.
            write: Whether this process is the one that writes.

        Raises:
            CheckpointError: What a killed fit left cannot be put back.
        """
        self._active, self._writes, self._own = self.folder is not None, write, set()
        self._seen, self._pending = {}, False
        for path in self._paths().values():
            if not resumed:
                _put_back(path)
        self._best = {name: self._value_in(path, model) for name, path in self._paths().items()}

    def end_epoch(self, model: DA3Model, metrics: Mapping[str, Any]) -> None:
        """An epoch has ended: save it, or wait until its monitored value is logged.

        Args:
            model: Has the domains.
            metrics: What is logged; saved with every domain, as far as it is finite.

        Raises:
            CheckpointError: A file cannot be written; the one that was there stays.
        """
        self._pending = self._active
        self._save(model, metrics)

    def logged(self, model: DA3Model, metrics: Mapping[str, Any], *, last: bool) -> None:
        """All that is logged of the last epoch is there.

        Args:
            model: Has the domains.
            metrics: As for `end_epoch`.
            last: Whether there will be no more.

        Raises:
            CheckpointError: A file cannot be written; the one that was there stays.
            ConfigError: The monitored metric is not among those that are logged.
        """
        if not self._pending:
            return
        self._save(model, metrics)
        self._pending = False
        if last and any(self._monitored(name, metrics) not in metrics for name in self.domains):
            raise ConfigError(
                f"DA3Callback(monitor={self.monitor!r}) monitors what is not logged, so that no "
                f"epoch could be saved. Logged are {sorted(metrics)}."
            )

    def end(self) -> None:
        """The fit has come to its end: what it found is no longer needed.

        Raises:
            CheckpointError: It cannot be removed.
        """
        for domain, path in self._paths().items():
            if domain not in self._own and self._best.get(domain) is not None:
                rank_zero_warn(
                    f"No epoch was as good as {str(path)!r}, whose {self.monitor!r} is "
                    f"{self._best[domain]:g}: that file is kept."
                )
            with _explained(path):
                _previous(path).unlink(missing_ok=True)
        self._active = False

    def abort(self) -> None:
        """The fit has failed: what it found is put back."""
        for path in self._paths().values():
            with contextlib.suppress(CheckpointError):  # the next fit tries again
                _put_back(path)
        self._active = False

    def last_good(self, domain: str) -> str:
        """Where the state of a domain from before an error is, for people."""
        path = self.path(domain)
        if path is None:
            return "No state was saved: give DA3Callback a `save_dir`."
        if domain in self._own and _previous(path).exists():
            return (
                f"The last good state of this fit is {str(_unfinished(path))!r}; {str(path)!r} is "
                "again what it was before."
            )
        if path.exists():
            return f"The last good state is {str(path)!r}."
        return "No epoch was finished yet, so no state was saved."

    def _paths(self) -> dict[str, Path]:
        """The file of every domain, while a fit runs that saves, in the process that does."""
        if self.folder is None or not self._active or not self._writes:
            return {}
        return {domain: self.folder / f"{domain}{SUFFIX}" for domain in self.domains}

    def _save(self, model: DA3Model, metrics: Mapping[str, Any]) -> None:
        """Save the epoch that is pending, if its monitored value is of this epoch, and as good."""
        names = {domain: self._monitored(domain, metrics) for domain in self.domains}
        logged: dict[str, Any] = {domain: metrics.get(name) for domain, name in names.items()}
        if self.monitor is not None:
            # of another epoch, which was validated
            old = [name for name, value in logged.items() if value is self._seen.get(name)]
            if old or None in logged.values():
                return
            self._seen = logged
        self._pending = False
        for domain, path in self._paths().items():
            value = None if self.monitor is None else float(logged[domain])
            if value is None or self._is_as_good(value, domain, path):
                if domain not in self._own and check_readable(path, "domain file"):
                    _keep(path)
                model.save_domain(domain, path, metrics=finite(metrics))
                self._own.add(domain)
                self._best[domain] = value

    def _monitored(self, domain: str, metrics: Mapping[str, Any]) -> str:
        """The name by which a domain's monitored value is logged: its own, where it has one."""
        own = f"{self.monitor}/{domain}"
        return own if own in metrics else str(self.monitor)

    def _is_as_good(self, value: float, domain: str, path: Path) -> bool:
        best = self._best[domain]
        if not math.isfinite(value):
            return not path.exists()  # better than nothing
        if best is None or not math.isfinite(best):
            return True
        return value <= best if self.mode == "min" else value >= best

    def _value_in(self, path: Path, model: DA3Model) -> float | None:
        """The monitored value of a file; None where it says none, or is of another network."""
        if self.monitor is None or not path.exists():
            return None
        try:
            about = read_domain(path).metadata
            check_identity(model, about, str(path))
            metrics = about["extra"]["metrics"]
            return float(metrics[self._monitored(path.name.removesuffix(SUFFIX), metrics)])
        except (DA3Error, KeyError, TypeError, ValueError):
            return None


def _previous(path: Path) -> Path:
    return path.with_name(f"{path.name}.previous")


def _unfinished(path: Path) -> Path:
    return path.with_name(f"{path.name}.unfinished")


def _keep(path: Path) -> None:
    """Copy the file of an earlier fit, unless that was done before this fit was resumed."""
    if not _previous(path).exists():
        with _explained(path), replacing(_previous(path)) as temporary:
            shutil.copyfile(path, temporary)


def _put_back(path: Path) -> None:
    """Undo what a fit that did not come to its end did to the file of an earlier one."""
    if _previous(path).exists():
        target = Path(os.path.realpath(path))  # of a link, what it points to
        with _explained(path):
            if target.exists():
                with replacing(_unfinished(path)) as temporary:
                    shutil.copyfile(target, temporary)
            shutil.move(_previous(path), target)
        rank_zero_info(
            f"A fit did not come to its end: {str(path)!r} is again what it was before, the last "
            f"epoch is {str(_unfinished(path))!r}."
        )


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"Cannot keep the domain file of an earlier fit beside {str(path)!r}: {error}. Check "
            "the folder's permissions and free space."
        ) from error
