"""What is read from accuracies on domains that were learnt one after the other.

R is the matrix of accuracies: R[i, j] is that on domain j once domain i was the last one learnt;
NaN where nothing was evaluated. T is the last row with an evaluation, so that all numbers can be
read before all domains are learnt. Evaluations that are missing are left out of means.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_da3.errors import ConfigError

PERFECT = 1000.0  # points of a domain without errors


def average_accuracy(matrix: Tensor) -> Tensor:
    """Mean accuracy over the domains learnt, after the last: mean over j <= T of R[T, j].

    Args:
        matrix: Accuracies (D, D); see `AccuracyMatrix.compute`.

    Returns:
        A fraction (), NaN if nothing was evaluated.

    Raises:
        ConfigError: The matrix is not square.

    Example:
        >>> average_accuracy(torch.tensor([[0.9, torch.nan], [0.7, 0.8]]))
        tensor(0.7500)
    """
    matrix, last = _with_last_row(matrix)
    return matrix[last, : last + 1].nanmean()


def forgetting(matrix: Tensor) -> Tensor:
    """How much accuracy each domain lost since its best: max over j <= i < T of R[i, j], - R[T, j].

    Negative where a domain is better than ever. NaN for the last domain itself, for those not yet
    learnt, and where an evaluation is missing. (Chaudhry et al. 2018.)

    Args:
        matrix: Accuracies (D, D); see `AccuracyMatrix.compute`.

    Returns:
        Differences of fractions (D,).

    Raises:
        ConfigError: The matrix is not square.

    Example:
        >>> forgetting(torch.tensor([[0.9, torch.nan], [0.7, 0.8]]))
        tensor([0.2000,    nan])
    """
    matrix, last = _with_last_row(matrix)
    if last == 0:
        return torch.full_like(matrix[0], torch.nan)
    earlier = matrix[:last]
    learnt = torch.ones_like(earlier, dtype=torch.bool).tril()  # domain j counts from row j on
    best = earlier.masked_fill(~learnt | earlier.isnan(), -torch.inf).amax(dim=0)
    return torch.where(best.isinf(), torch.nan, best - matrix[last])


def backward_transfer(matrix: Tensor) -> Tensor:
    """What learning later domains did to earlier ones: mean over j < T of R[T, j] - R[j, j].

    Zero: nothing was forgotten. (Lopez-Paz and Ranzato 2017, equation 3.)

    Args:
        matrix: Accuracies (D, D); see `AccuracyMatrix.compute`.

    Returns:
        A difference of fractions (), NaN with fewer than two domains.

    Raises:
        ConfigError: The matrix is not square.

    Example:
        >>> backward_transfer(torch.tensor([[0.9, torch.nan], [0.7, 0.8]]))
        tensor(-0.2000)
    """
    matrix, last = _with_last_row(matrix)
    return (matrix[last] - matrix.diagonal())[:last].nanmean()


def forward_transfer(matrix: Tensor, untrained: Tensor) -> Tensor:
    """What learning earlier domains did for later ones: mean over 0 < j <= T of R[j - 1, j] - b[j].

    (Lopez-Paz and Ranzato 2017, equation 4.)

    Args:
        matrix: Accuracies (D, D); see `AccuracyMatrix.compute`. It needs evaluations on domains
            before they are learnt.
        untrained: b, the accuracy (D,) of an untrained network on each domain, such as one by its
            number of classes.

    Returns:
        A difference of fractions (), NaN with fewer than two domains.

    Raises:
        ConfigError: The matrix is not square, or `untrained` does not fit it.

    Example:
        >>> forward_transfer(torch.tensor([[0.9, 0.6], [0.7, 0.8]]), torch.tensor([0.5, 0.5]))
        tensor(0.1000)
    """
    matrix, last = _with_last_row(matrix)
    if untrained.shape != matrix.shape[:1]:
        raise ConfigError(
            f"`untrained` must be ({len(matrix)},), one accuracy for every domain of `matrix`, got "
            f"{tuple(untrained.shape)}."
        )
    gained = matrix.diagonal(1) - untrained.to(matrix)[1:]
    return gained[:last].nanmean()


def decathlon_points(accuracy: Tensor, fine_tuned: Tensor) -> Tensor:
    """Points of each domain: 1000 * max(0, 1 - E / E_max)^2, with E_max = 2 * E_fine_tuned.

    E = 1 - accuracy is an error. 1000 points have no error, 250 as many errors as fine-tuning, 0
    twice as many. (Rebuffi et al. 2017, section 4, where the same is written
    alpha * max(0, E_max - E)^2 with alpha = 1000 / E_max^2.)

    Args:
        accuracy: Fractions (D,); NaN: not evaluated.
        fine_tuned: Fractions (D,) below 1, of the whole network fine-tuned on each domain alone.

    Returns:
        Points (D,), NaN where not evaluated.

    Raises:
        ConfigError: The shapes differ, or a value is no such fraction.

    Example:
        >>> decathlon_points(torch.tensor([0.75, 0.875, 1.0]), torch.tensor([0.75, 0.75, 0.75]))
        tensor([ 250.0000,  562.5000, 1000.0000])
    """
    if accuracy.shape != fine_tuned.shape or accuracy.ndim != 1 or not len(accuracy):
        raise ConfigError(
            "`accuracy` and `fine_tuned` must be (D,) with D > 0, one fraction for every domain, "
            f"got {tuple(accuracy.shape)} and {tuple(fine_tuned.shape)}."
        )
    low, high = float(fine_tuned.min()), float(fine_tuned.max())
    if not (low >= 0 and high < 1) or ((accuracy < 0) | (accuracy > 1)).any():
        raise ConfigError(
            "Accuracies must be fractions from 0 to 1, and those of `fine_tuned` below 1: points "
            f"compare errors with its errors. Got {accuracy.tolist()} and {fine_tuned.tolist()}."
        )
    most = 2 * (1 - fine_tuned.to(accuracy))
    return PERFECT * (1 - (1 - accuracy) / most).clamp(min=0) ** 2


def decathlon_score(accuracy: Tensor, fine_tuned: Tensor) -> Tensor:
    """The sum of `decathlon_points`; a domain that was not evaluated has none.

    Args:
        accuracy: See `decathlon_points`.
        fine_tuned: See `decathlon_points`.

    Returns:
        Points (), from 0 to 1000 for every domain.

    Raises:
        ConfigError: See `decathlon_points`.

    Example:
        >>> decathlon_score(torch.tensor([0.75, 0.875]), torch.tensor([0.75, 0.75]))
        tensor(812.5000)
    """
    return decathlon_points(accuracy, fine_tuned).nansum()


def _with_last_row(matrix: Tensor) -> tuple[Tensor, int]:
    """The matrix as (D, D), and its last row with an evaluation; 0 if there is none."""
    if matrix.ndim == 0:
        matrix = matrix.reshape(1, 1)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.numel():
        raise ConfigError(f"`matrix` must be (D, D) with D > 0, got {tuple(matrix.shape)}.")
    evaluated = (~matrix.isnan()).any(dim=1).nonzero()
    return matrix, int(evaluated.max()) if len(evaluated) else 0
