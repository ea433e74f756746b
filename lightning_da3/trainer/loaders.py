"""DomainLoader: batches of several domains, in turns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.utilities import CombinedLoader
from typing_extensions import override

from lightning_da3.errors import ConfigError
from lightning_da3.files.names import check_name


class DomainLoader(CombinedLoader):
    """The loaders of several domains, taken in turns: each batch is ``{name: batch}``.

    An epoch ends when every loader has given all its batches once; a loader that has no more is
    passed over. `DA3Callback` activates the domain that a batch names and gives the LightningModule
    the batch itself. Samplers of the loaders are made distributed as those of any CombinedLoader.
    For a Trainer of the `lightning` package; one of `pytorch_lightning` would not take turns.

    Args:
        loaders: By name of the domain, at least one.

    Raises:
        ConfigError: There is no loader, or they have no names, or give no batches.
        DomainError: A name cannot be a domain's.
    """

    def __init__(self, loaders: Mapping[str, Iterable[Any]]) -> None:
        if not isinstance(loaders, Mapping) or not loaders:
            raise ConfigError(
                f"`loaders` must be a dict of loaders by name of the domain, got {loaders!r}."
            )
        for name, loader in loaders.items():
            check_name(name)
            if not isinstance(loader, Iterable):
                raise ConfigError(
                    f"The loader of domain {name!r} must give batches, got {type(loader).__name__}."
                )
        super().__init__(dict(loaders), mode="max_size")
        self._turns: Iterator[dict[str, Any]] | None = None
        self._taken = 0

    @override
    def __iter__(self) -> DomainLoader:
        self._turns, self._taken = self._take_turns(), 0
        return self

    @override
    def __next__(self) -> tuple[dict[str, Any], int, int]:
        if self._turns is None:
            iter(self)
        assert self._turns is not None
        batch = next(self._turns)
        self._taken += 1
        return batch, self._taken - 1, 0

    @override
    def __len__(self) -> int:
        length = sum(self._lengths().values())
        if length == float("inf"):
            raise TypeError("A DomainLoader has a length if all of its loaders have.")
        return int(length)

    @override
    def reset(self) -> None:
        super().reset()
        self._turns = None

    def _take_turns(self) -> Iterator[dict[str, Any]]:
        left = self._lengths()
        iterators = {name: iter(loader) for name, loader in self.iterables.items()}
        while iterators:
            for name in list(iterators):
                try:
                    if left[name] <= 0:
                        raise StopIteration
                    batch = next(iterators[name])
                except StopIteration:
                    del iterators[name]
                    continue
                left[name] -= 1
                yield {name: batch}

    def _lengths(self) -> dict[str, float]:
        """Batches that each loader has, as far as it is known, and the Trainer lets it give."""
        sizes = [sized_len(loader) for loader in self.iterables.values()]
        known = [float("inf") if size is None else size for size in sizes]
        limits = self.limits or known
        return {n: min(k, m) for n, k, m in zip(self.iterables, known, limits, strict=True)}
