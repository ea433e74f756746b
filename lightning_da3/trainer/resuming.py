"""The order of the batches of an epoch, which outlives a stop."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

from lightning_da3.errors import CheckpointError


class BatchOrder:
    """How many batches of an epoch were trained with, and the random state that ordered them.

    An epoch is resumed by taking its first batches again, unused, from the random state in which
    they were taken before.

    Attributes:
        batches: The number of batches of this epoch that were trained with.
        epoch_rng: The random state at the start of this epoch.
        generators: The generators of the loader and of its samplers.
    """

    def __init__(self) -> None:
        self.batches = 0
        self.epoch_rng: dict[str, Any] = {}
        self.generators: list[Any] = []
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
        self.generators = list(generators_of(loader))
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


def generators_of(loader: Any) -> Iterator[Any]:
    """The random generators of a loader, of its samplers, and of the samplers inside of those.

    Those of PyTorch, numpy and Python, each once, in the same order every time.
    """
    waiting = [getattr(loader, name, None) for name in ("generator", "batch_sampler", "sampler")]
    seen: list[Any] = [None]  # by identity; holds them, so that none is another's successor
    while waiting:
        thing = waiting.pop(0)
        if any(thing is other for other in seen):
            continue
        seen.append(thing)
        if isinstance(thing, (torch.Generator, np.random.Generator, *_WITH_STATE)):
            yield thing
        elif isinstance(thing, (list, tuple)):
            waiting += [entry for entry in thing if _may_order(entry)]
        else:
            inside = getattr(thing, "__dict__", {})
            waiting += [value for name, value in inside.items() if _may_order(value, name)]


_WITH_STATE = (np.random.RandomState, random.Random)


def _may_order(thing: Any, name: str = "") -> bool:
    """Whether a part of a sampler may decide the order: not its data."""
    if isinstance(thing, (list, tuple)):
        return 0 < len(thing) <= 64 and all(_may_order(entry) for entry in thing)
    kinds = (Sampler, torch.Generator, np.random.Generator, *_WITH_STATE)
    return isinstance(thing, kinds) or name in ("sampler", "batch_sampler")


def _state_of(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return _plain(generator.bit_generator.state)
    if isinstance(generator, random.Random):
        return generator.getstate()
    return _plain(generator.get_state())


def _plain(state: Any) -> Any:
    """A state of numpy's, of plain types."""
    if isinstance(state, dict):
        return {name: _plain(value) for name, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [_plain(value) for value in state]
    return state.tolist() if isinstance(state, (np.ndarray, np.generic)) else state


def _set_state_of(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state.cpu())
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        _set_python_state(generator.setstate, state)
    else:
        generator.set_state(tuple(state))


def _set_python_state(setstate: Callable[[Any], None], state: Any) -> None:
    version, internal, gauss = state
    setstate((version, tuple(internal), gauss))


def _rng_state(generators: Sequence[Any]) -> dict[str, Any]:
    """The state of every generator that training may draw from; plain types and tensors."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": _plain(np.random.get_state()),  # noqa: NPY002 - the one that others draw from
        "python": random.getstate(),
        "loader": [_state_of(generator) for generator in generators],
    }


def _set_rng_state(state: dict[str, Any], generators: Sequence[Any]) -> None:
    if len(state["loader"]) != len(generators):
        raise CheckpointError(
            f"The checkpoint has the states of {len(state['loader'])} random generators of the "
            f"dataloader and its samplers, which have {len(generators)} now. Give the loader that "
            "it was made with, or delete the checkpoint to learn the domain from its beginning."
        )
    torch.set_rng_state(state["torch"].cpu())
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([device.cpu() for device in state["cuda"]])
    np.random.set_state(tuple(state["numpy"]))  # noqa: NPY002
    _set_python_state(random.setstate, state["python"])
    for generator, its_state in zip(generators, state["loader"], strict=True):
        _set_state_of(generator, its_state)
