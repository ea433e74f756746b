"""Metrics of many domains: what is learned, kept, and worth. Accuracies are fractions from 0 to 1.

Classes are metrics of torchmetrics, whose counts add up over batches and processes; functions give
the same from numbers that are there already.
"""

from lightning_da3.metrics.decathlon import VISUAL_DECATHLON, DecathlonScore
from lightning_da3.metrics.functional import (
    average_accuracy,
    backward_transfer,
    decathlon_points,
    decathlon_score,
    forgetting,
    forward_transfer,
)
from lightning_da3.metrics.matrix import AccuracyMatrix

__all__ = [
    "VISUAL_DECATHLON",
    "AccuracyMatrix",
    "DecathlonScore",
    "average_accuracy",
    "backward_transfer",
    "decathlon_points",
    "decathlon_score",
    "forgetting",
    "forward_transfer",
]
