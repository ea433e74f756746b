"""The files of the domains that a run learns, kept up to date."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_da3.files.folders import make_folder
from lightning_da3.model.model import DA3Model
from lightning_da3.trainer.figures import finite


class DomainFiles:
    """``<domain>.safetensors`` for every domain of a run, in one folder.

    Args:
        folder: The folder, or None to save nothing.
    """

    def __init__(self, folder: str | None) -> None:
        self.folder = None if folder is None else Path(folder)

    def path(self, domain: str) -> Path | None:
        """The file of a domain; None if nothing is saved."""
        return None if self.folder is None else self.folder / f"{domain}.safetensors"

    def save(self, model: DA3Model, domains: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
        """Write every domain anew.

        Args:
            model: Has the domains.
            domains: By name.
            metrics: Saved with every domain, as far as they are finite.

        Raises:
            CheckpointError: A file cannot be written; the one that was there stays.
        """
        if self.folder is None:
            return
        make_folder(self.folder)
        for domain in domains:
            model.save_domain(
                domain, self.folder / f"{domain}.safetensors", metrics=finite(metrics)
            )

    def last_good(self, domain: str) -> str:
        """Where the state of a domain from before an error is, for people."""
        path = self.path(domain)
        if path is None:
            return "No state was saved: give DA3Callback a `save_dir`."
        if path.exists():
            return f"The last good state is {str(path)!r}."
        return "No epoch was finished yet, so no state was saved."
