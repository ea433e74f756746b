"""Parts of a data set in which the classes have their shares."""

from __future__ import annotations

import torch
from torch import Tensor


def split(labels: Tensor, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Two parts of a data set, each class in its share.

    Args:
        labels: One a sample.
        fraction: Share of the second part, in (0, 1).
        seed: The same seed splits the same way.

    Returns:
        The samples of the first part and of the second. Every class has at least one in the first,
        and one in the second if it has two.
    """
    generator = torch.Generator().manual_seed(seed)
    first, second = [], []
    for label in labels.unique().tolist():
        samples = (labels == label).nonzero()[:, 0]
        samples = samples[torch.randperm(len(samples), generator=generator)].tolist()
        count = min(len(samples) - 1, max(1, round(fraction * len(samples))))
        second += samples[:count]
        first += samples[count:]
    return sorted(first), sorted(second)


def at_most(labels: Tensor, count: int | None, seed: int) -> list[int]:
    """So many samples at most, each class in its share and with one at least; None: all."""
    if count is None or count >= len(labels):
        return list(range(len(labels)))
    dropped = 1 - count / len(labels)
    return split(labels, dropped, seed)[0]
