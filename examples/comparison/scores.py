"""Scores over domains."""

from __future__ import annotations

from collections.abc import Mapping


def decathlon_score(
    accuracy: Mapping[str, float], tuned: Mapping[str, float], images: Mapping[str, int]
) -> float:
    """The Visual Decathlon's score, with fine-tuning of the same run as its mark.

    The sum over domains of 1000 * (max(0, Emax - E) / Emax)^2, E the error and Emax twice that of
    fine-tuning: 250 a domain for fine-tuning itself, 1000 for no error (Rebuffi et al. 2017).

    Args:
        accuracy: Fractions by domain.
        tuned: Those of fine-tuning.
        images: Number of test images by domain. Where fine-tuning makes no error, half an image
            counts as its error, as nothing could be measured against none.
    """
    total = 0.0
    for domain, share in accuracy.items():
        largest = 2 * max(1 - tuned[domain], 0.5 / images[domain])
        total += 1000 * (max(0.0, largest - (1 - share)) / largest) ** 2
    return total
