"""Inference on a device."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from lightning_da3.device.domains import read_domain_for
from lightning_da3.device.session import Array, Session, parts_of
from lightning_da3.errors import DomainError, InputError
from lightning_da3.formatting import shown


class Predictor:
    """Computes the outputs of a domain, from a file that `DA3Model.export` wrote in ONNX.

    Args:
        path: The exported file.
        domain_file: The domain, for files with ``domains="inputs"``; None: it is loaded later.
        options: An `onnxruntime.SessionOptions`; None: as ONNX Runtime has it by default.

    Raises:
        CheckpointError: A file is missing, damaged or foreign, or they do not fit each other.
        DA3Error: ONNX Runtime is not installed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        domain_file: str | os.PathLike[str] | None = None,
        *,
        options: Any = None,
    ) -> None:
        self.session = Session(path, "inference", options)
        self._tensors: Mapping[str, Array] | None = None
        if domain_file is not None:
            self.load_domain(domain_file)

    @property
    def parameters(self) -> list[str]:
        """Names of the domain's tensors that the file takes; none if the domain is inside."""
        network = self.session.network_inputs
        return [name for name in self.session.inputs if name not in network]

    def load_domain(self, path: str | os.PathLike[str]) -> str:
        """Compute with another domain from now on.

        Args:
            path: A file that `DA3Model.save_domain` or `Learner.save` wrote.

        Returns:
            The domain's name.

        Raises:
            CheckpointError: The file is missing or damaged, or does not fit.
            DomainError: The exported file has its domain inside.
        """
        names = self.parameters
        if not names:
            raise DomainError(
                f"{self.session.path!r} has the domain {self.session.manifest['domain']!r} inside "
                "and takes no other. Export it with domains='inputs'."
            )
        found = read_domain_for(self.session, path, names)
        self._tensors = {name: found.tensors[name].array for name in names}
        return str(found.metadata["domain"])

    def predict(self, images: Any, *, batch_size: int = 32) -> Any:
        """The network's outputs, such as scores (N, classes).

        Args:
            images: An array (N, ...), or a tuple of arrays, as the network takes them.
            batch_size: Samples that are computed at once, if the file takes any number.

        Returns:
            An array; a list of them if the network gives several.

        Raises:
            InputError: The images do not fit the network.
            DomainError: No domain was loaded.
        """
        if self._tensors is None and self.parameters:
            raise DomainError(
                f"{self.session.path!r} takes a domain as input: call `load_domain` first."
            )
        return self.predict_with(self._tensors or {}, images, batch_size)

    def predict_with(self, tensors: Mapping[str, Array], images: Any, batch_size: int = 32) -> Any:
        """See `predict`.

        Args:
            tensors: The domain's, by name.
            images: See `predict`.
            batch_size: See `predict`.
        """
        check_count("batch_size", batch_size)
        given, size = self.session.images(images), self.session.samples or batch_size
        check_whole_parts(given, self.session)
        found = [self.session.run({**part, **tensors}) for part in parts_of(given, size)]
        joined = [
            np.concatenate([part[name] for part in found]) if len(found) > 1 else found[0][name]
            for name in self.session.outputs
        ]
        return joined[0] if len(joined) == 1 else joined


def check_count(name: str, value: object) -> None:
    """Refuse what is no number of samples or epochs.

    Raises:
        InputError: It is none.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"`{name}` must be an int of at least 1, got {shown(value)}.")


def check_whole_parts(given: Mapping[str, Array], session: Session) -> None:
    """Refuse samples that a file for a fixed number of them cannot take.

    Raises:
        InputError: They are no multiple of it.
    """
    count, fixed = len(next(iter(given.values()))), session.samples
    if fixed is not None and count % fixed:
        raise InputError(
            f"{session.path!r} takes {fixed} samples at once, got {count}. Give a multiple, or "
            "export it with dynamic_batch=True."
        )
