"""How gates are learned in the course of training, in Lightning and on a device."""

from __future__ import annotations

import math

NOISE_UNTIL = 0.8  # of training; the gates settle without noise
LEAST_CHANCE = 1e-6  # noise is the logit of a chance, from this to one less this


def annealed_target(target: float, progress: float) -> float:
    """The share to execute at this point of training: from 1 by a cosine, `target` from half on.

    Args:
        target: The share in the end, in (0, 1].
        progress: How far training is, in [0, 1].
    """
    done = 0.5 * (1.0 - math.cos(math.pi * min(1.0, 2.0 * progress)))
    return 1.0 - done * (1.0 - target)
