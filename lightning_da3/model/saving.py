"""Domains in files."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor

from lightning_da3.errors import CheckpointError, DA3Error
from lightning_da3.files.artifacts import local_file
from lightning_da3.files.domain_file import domain_file_bytes, read_domain, write_domain
from lightning_da3.files.names import check_name
from lightning_da3.model.branches import ordered_branches
from lightning_da3.model.identity import check_identity, identity
from lightning_da3.model.outside import tensors_of
from lightning_da3.model.skipping import SkipsBranches
from lightning_da3.model.state import HAS_STATISTICS, OUTSIDE, check_tensors, outside_in
from lightning_da3.model.versions import scaled_today


class SavesDomains(SkipsBranches):
    """A backbone whose domains are saved, each in a file of its own."""

    def save_domain(self, name: str, path: str | os.PathLike[str], **metadata: Any) -> None:
        """Write one domain to a safetensors file, whole or not at all.

        Args:
            name: One of `domains`.
            path: The file; its folder must exist.
            metadata: Anything JSON holds that should lie with it, such as metrics.

        Raises:
            DomainError: There is no such domain.
            CheckpointError: It cannot be written, or holds NaN; a file that was there stays.
        """
        write_domain(path, self._tensors(name), self._about(name, metadata))

    def domain_file_bytes(self, name: str) -> int:
        """The size of the file that `save_domain` makes of one domain, in bytes.

        Raises:
            DomainError: There is no such domain.
        """
        return domain_file_bytes(self._tensors(name), self._about(name, {}))

    def _tensors(self, name: str) -> dict[str, Tensor]:
        """What a domain's file holds."""
        self.refresh()
        return dict(self.domain(name).state_dict())

    def _about(self, name: str, metadata: dict[str, Any]) -> dict[str, Any]:
        """What a domain's file says of it."""
        domain = self.domain(name)
        about: dict[str, Any] = {
            "domain": name,
            "num_classes": domain.num_classes,
            "extra": metadata,
        }
        if domain.class_names is not None:
            about["class_names"] = domain.class_names
        if domain.skipped:
            about["skipped"] = list(domain.skipped)
        return {**about, **identity(self)}

    def load_domain(self, path: str | os.PathLike[str], name: str | None = None) -> str:
        """Add the domain that `save_domain` wrote.

        Args:
            path: The file; or an artifact of Weights & Biases, which a run that is open then uses:
                ``wandb:entity/project/name:best`` (`lightning_da3.files.artifacts`).
            name: What to call it here; by default as it was called.

        Returns:
            Its name.

        Raises:
            CheckpointError: The file is damaged or foreign, or was made for another backbone or
                another config; the model is left as it was.
            DomainError: There is a domain of that name already.
        """
        with local_file(path) as local:
            file = read_domain(local)
        check_identity(self, file.metadata, str(path))
        about, has_statistics = file.metadata, HAS_STATISTICS in file.tensors
        classes = (about["num_classes"], about.get("class_names"))
        try:
            if name is None:  # a name that was good enough once can be replaced here
                check_name(about["domain"])
            expected = self.expected_tensors(*classes, statistics=has_statistics)
            outside = outside_in(file.tensors)
            check_tensors(file.tensors, {**expected, **self.expected_outside(None, outside)})
            skipped = ordered_branches(self._whole, about.get("skipped", ()))
        except DA3Error as error:
            raise CheckpointError(
                f"The domain file {str(path)!r} does not fit this model: {error}"
            ) from error
        name = about["domain"] if name is None else name
        self.add_domain(name, *classes)
        if has_statistics:
            self.expect_statistics(name)
        self.expect_outside(name, outside)
        domain = self.domain(name)
        own = {f"{OUTSIDE}{key}": value for key, value in tensors_of(domain.outside).items()}
        domain.load_state_dict({**own, **scaled_today(file.tensors, about["config"])})
        self.skip(name, skipped)
        return name
