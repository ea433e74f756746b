"""Scores over domains."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lightning_da3 import metrics


def decathlon_score(
    accuracy: Mapping[str, float], tuned: Mapping[str, float], images: Mapping[str, int]
) -> float:
    """The Visual Decathlon's score, with fine-tuning of the same run as its mark.

    See `lightning_da3.metrics.decathlon_score`.

    Args:
        accuracy: Fractions by domain.
        tuned: Those of fine-tuning.
        images: Number of test images by domain. Where fine-tuning makes no error, half an image
            counts as its error, as nothing could be measured against none.
    """
    marks = [min(tuned[domain], 1 - 0.5 / images[domain]) for domain in accuracy]
    shares = torch.tensor([*accuracy.values()], dtype=torch.double)
    return metrics.decathlon_score(shares, torch.tensor(marks, dtype=torch.double)).item()
