"""The order of the batches of an epoch, which outlives a stop."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch


class BatchOrder:
    """How many batches of an epoch were trained with, and the random state that ordered them.

    An epoch is resumed by taking its first batches again, unused, from the random state in which
    they were taken before.

    Attributes:
        batches: The number of batches of this epoch that were trained with.
        epoch_rng: The random state at the start of this epoch.
        generators: The generators of the loader and of its sampler.
    """

    def __init__(self) -> None:
        self.batches = 0
        self.epoch_rng: dict[str, Any] = {}
        self.generators: list[torch.Generator] = []
        self._resume: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors."""
        rng = _rng_state(self.generators)
        return {"batches": self.batches, "epoch_rng": self.epoch_rng, "rng": rng}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Used when batches are asked for next."""
        self._resume = state

    def batches_of(self, loader: Any) -> Iterator[Any]:
        """One epoch, or the rest of one; nothing happens before the first batch is asked for."""
        owners = (loader, getattr(loader, "sampler", None))
        found = [getattr(owner, "generator", None) for owner in owners]
        self.generators = list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())
        resume, self._resume = self._resume, None
        taken = 0 if resume is None else resume["batches"]
        if resume is not None:
            _set_rng_state(resume["epoch_rng" if taken else "rng"], self.generators)
        self.epoch_rng = _rng_state(self.generators)
        batches = iter(loader)
        if resume is not None and taken:
            for _ in islice(batches, taken):
                pass
            _set_rng_state(resume["rng"], self.generators)
        yield from batches


class ResumableLoader:
    """A dataloader whose order of batches outlives a stop; in all else, the one that it wraps.

    Args:
        loader: The dataloader.
        order: The order of its batches.
    """

    def __init__(self, loader: Any, order: BatchOrder) -> None:
        self.loader, self.order = loader, order

    def __iter__(self) -> Iterator[Any]:
        return self.order.batches_of(self.loader)

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def state_dict(self) -> dict[str, Any]:
        """Empty: Lightning looks for the method, `SequenceCheckpoint` has the state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to do."""


def _rng_state(generators: Sequence[torch.Generator]) -> dict[str, Any]:
    """The state of every generator that training may draw from; plain types and tensors."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 - the one that others draw from
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "python": random.getstate(),
        "loader": [generator.get_state() for generator in generators],
    }


def _set_rng_state(state: dict[str, Any], generators: Sequence[torch.Generator]) -> None:
    torch.set_rng_state(state["torch"].cpu())
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([device.cpu() for device in state["cuda"]])
    np.random.set_state(tuple(state["numpy"]))  # noqa: NPY002
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    for generator, its_state in zip(generators, state["loader"], strict=True):
        generator.set_state(its_state.cpu())
