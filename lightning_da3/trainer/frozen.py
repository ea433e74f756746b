"""Finds out whether anything frozen changed while domains were learned."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from lightning_da3.errors import DA3Error
from lightning_da3.model.model import DA3Model
from lightning_da3.trainer.refusals import BACKBONE_OUT_OF_REACH


class FrozenTensors:
    """A checksum of every tensor of a network that a run must leave as it is.

    Args:
        model: The network.
        domains: Names of the domains that are learned, and so may change.
    """

    def __init__(self, model: DA3Model, domains: Iterable[str]) -> None:
        self.domains = list(domains)
        self.sums = dict(self._sums(model))

    def check(self, model: DA3Model) -> None:
        """Refuse that anything changed.

        Raises:
            DA3Error: Something did, which only code beside this package can have done.
        """
        now = dict(self._sums(model))
        changed = sorted(name for name, value in self.sums.items() if now.get(name) != value)
        if changed:
            raise DA3Error(
                f"{len(changed)} frozen tensors changed while {self.domains} trained, such as "
                f"{changed[:3]}: {BACKBONE_OUT_OF_REACH}. Look for a callback, a hook or an "
                "optimizer step of your own that edits parameters which require no gradient."
            )

    def _sums(self, model: DA3Model) -> Iterator[tuple[str, int]]:
        learned = tuple(f"bank.{name}." for name in self.domains)
        for tensors in (model.named_parameters(), model.named_buffers()):
            for name, value in tensors:
                if not name.startswith(learned):
                    yield name, _sum_of_bits(value)


def _sum_of_bits(value: Tensor) -> int:
    """A checksum that changes with any bit, but for rare chance, and takes next to no memory."""
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[value.itemsize]
    return int(value.detach().contiguous().view(-1).view(whole).sum())
