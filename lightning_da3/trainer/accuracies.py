"""The accuracy of every domain after each was learned, as far as a run's own metrics tell."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lightning_da3.model.model import DA3Model
from lightning_da3.trainer.curves import is_accuracy


class Accuracies:
    """What is known of one network, over all Trainers that it learns with.

    Attributes:
        order: The domains in the order in which they were learned.
    """

    def __init__(self) -> None:
        self.order: list[str] = []
        self._cells: dict[tuple[str, str], float] = {}

    @classmethod
    def of(cls, model: DA3Model) -> Accuracies:
        """Those of a network."""
        return _ALL.setdefault(model, cls())

    def learned(self, domains: Iterable[str]) -> None:
        """These were learned, at the same time."""
        for domain in domains:
            if domain in self.order:
                self.order.remove(domain)
            self.order.append(domain)

    def see(self, metrics: Mapping[str, Any]) -> bool:
        """Take accuracies from logged metrics, as of after the last domain learned.

        Args:
            metrics: By name: ``val/acc/flowers`` of any domain, or ``val/acc``, of the last.

        Returns:
            Whether there were any.
        """
        found = accuracies_in(metrics, self.order)
        self._cells |= {(self.order[-1], domain): value for domain, value in found.items()}
        return bool(found)

    @property
    def matrix(self) -> Tensor:
        """(D, D): rows after a domain, columns on a domain, NaN where not evaluated."""
        return torch.tensor(
            [
                [self._cells.get((row, column), math.nan) for column in self.order]
                for row in self.order
            ]
        )


_ALL: WeakKeyDictionary[DA3Model, Accuracies] = WeakKeyDictionary()


def accuracies_in(metrics: Mapping[str, Any], domains: Sequence[str]) -> dict[str, float]:
    """The accuracy of each domain among logged metrics.

    Args:
        metrics: By name.
        domains: Names, that of the last at the end: what has no domain's name is of it.

    Returns:
        Fractions by domain. Of several accuracies that with the shortest name counts.
    """
    found: dict[str, float] = {}
    names = sorted(metrics, key=lambda name: (len(name), name))
    for domain in domains:
        own = [n for n in names if n.endswith(f"/{domain}")]
        plain = [n for n in names if domain == domains[-1] and not _of_another(n, domains)]
        for name in [*own, *plain]:
            value = float(metrics[name])
            if is_accuracy(name) and 0.0 <= value <= 1.0:
                found.setdefault(domain, value)
    return found


def _of_another(name: str, domains: Sequence[str]) -> bool:
    return bool(re.search(r"_step$|_epoch$|dataloader_idx", name)) or any(
        name.endswith(f"/{domain}") for domain in domains
    )
