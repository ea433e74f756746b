"""Finds out whether anything frozen changed while domains were learned."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from lightning_da3.errors import DA3Error
from lightning_da3.model.model import DA3Model
from lightning_da3.model.state import SHARED
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
        learned = (*(f"bank.{name}." for name in self.domains), SHARED)
        state = model.state_dict(keep_vars=True)  # has what trains beside the network as well
        for name, value in {**state, **dict(model.named_buffers())}.items():
            if isinstance(value, Tensor) and not name.startswith(learned):
                yield name, _checksum(value, _weights(value.device))


def _checksum(value: Tensor, weights: Tensor) -> int:
    """A number that changes with any bit and with the order, but for rare chance."""
    bits = value.detach().contiguous().view(-1)
    bits = bits.view({1: torch.int8, 2: torch.int16}.get(value.itemsize, torch.int32))
    total = 0
    for part in torch.split(
        bits, len(weights)
    ):  # a weight for every position, and sums modulo 2^64
        total = (total * _FACTOR + int(part.long().mul_(weights[: len(part)]).sum())) % 2**64
    return total


_FACTOR = 0x9E3779B97F4A7C15  # odd


@functools.cache
def _weights(device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(2**62), 2**62, (2**16,), generator=generator).to(device)
