"""What learning on a device goes on from: the domain, the optimizer's state, and how far it was."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from lightning_da3.device.domains import CHECKPOINT, check_fits
from lightning_da3.device.session import Array, Session
from lightning_da3.errors import CheckpointError
from lightning_da3.files.content import Content, read_content, write_content
from lightning_da3.files.stored import Stored
from lightning_da3.formatting import shown


class Checkpoint(NamedTuple):
    """How far a fit is, after one of its epochs.

    Attributes:
        state: What goes from step to step, by the names of the training file.
        steps: How many were made.
        losses: Of the epochs that are finished.
        run: What the fit was asked for; another one does not go on from it.
        random: The state of the generator.
    """

    state: Mapping[str, Array]
    steps: int
    losses: list[float]
    run: Mapping[str, Any]
    random: Mapping[str, Any]

    def write(self, path: str | os.PathLike[str], start: Content) -> None:
        """Write it, whole or not at all.

        Args:
            path: The file; its folder must exist.
            start: What learning began with.

        Raises:
            CheckpointError: It cannot be written, or holds NaN; a file that was there stays.
        """
        stored = {name: Stored.of(array) for name, array in self.state.items()}
        said = {key: value for key, value in self._asdict().items() if key != "state"}
        write_content(path, stored.items(), {**start.metadata, CHECKPOINT: said})

    @classmethod
    def read(
        cls,
        path: str | os.PathLike[str],
        session: Session,
        state: Mapping[str, Array],
        run: Mapping[str, Any],
    ) -> Checkpoint:
        """What `write` wrote.

        Args:
            path: The file.
            session: The training file that goes on.
            state: Its state, for the names.
            run: What the fit is asked for.

        Raises:
            CheckpointError: It is damaged or no checkpoint, or of another model, file or fit.
        """
        found = read_content(path)
        said = found.metadata.get(CHECKPOINT)
        if not isinstance(said, dict):
            raise CheckpointError(
                f"{os.fspath(path)!r} is no checkpoint of a fit. Choose another path."
            )
        check_fits(found, path, session, list(state))
        if said["run"] != run:
            theirs, mine = (
                ", ".join(f"{key}={shown(value)}" for key, value in about.items())
                for about in (said["run"], run)
            )
            raise CheckpointError(
                f"{os.fspath(path)!r} is of another fit ({theirs}; now {mine}). Go on with the "
                "same, or remove the file to begin anew."
            )
        arrays = {name: found.tensors[name].array for name in state}
        return cls(arrays, said["steps"], said["losses"], said["run"], said["random"])
