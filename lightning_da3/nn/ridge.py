"""Ridge regression from sums over batches, in one pass.

Shapes: N rows, D features, K targets. Kept are D * D and D * K sums in float64, not the rows.
Sources: Hoerl, Kennard, "Ridge Regression: Biased Estimation for Nonorthogonal Problems", 1970;
Golub, Heath, Wahba, "Generalized Cross-Validation as a Method for Choosing a Good Ridge
Parameter", 1979.
"""

from __future__ import annotations

import torch
from torch import Tensor

STRENGTHS = [2.0**power for power in range(-8, 7)]  # of the penalty, in mean squared features


class Ridge:
    """Weights that predict targets from features, with a penalty that fits best.

    Args:
        centred: Whether there is a bias, which is not penalised.
    """

    def __init__(self, *, centred: bool) -> None:
        self.centred = centred
        self.count = 0
        self.squares: Tensor = torch.zeros(()).double()  # sum of all targets, squared
        self.features: Tensor = torch.zeros(()).double()  # sums, and those of products
        self.targets: Tensor = torch.zeros(()).double()
        self.gram: Tensor = torch.zeros(()).double()
        self.cross: Tensor = torch.zeros(()).double()

    def add(self, features: Tensor, targets: Tensor) -> None:
        """Takes rows (N, D) and their targets (N, K)."""
        x, y = features.double().cpu(), targets.double().cpu()
        self.count += len(x)
        self.squares = self.squares + y.square().sum()
        self.features, self.targets = self.features + x.sum(0), self.targets + y.sum(0)
        self.gram, self.cross = self.gram + x.T @ x, self.cross + x.T @ y

    def __add__(self, other: Ridge) -> Ridge:
        """Of the rows of both."""
        both = Ridge(centred=self.centred)
        for name in ("count", "squares", "features", "targets", "gram", "cross"):
            setattr(both, name, getattr(self, name) + getattr(other, name))
        return both

    def error(self, weights: Tensor, bias: Tensor) -> float:
        """The sum of the squared errors that such a prediction makes of these rows.

        Of the sums alone: ``|Y - X W' - b|^2`` is ``|Y|^2 - 2 tr(W X'Y) + tr(W X'X W')
        + 2 b . (W X'1 - Y'1) + N |b|^2``.

        Args:
            weights: W (K, D).
            bias: b (K).
        """
        crossed = (weights * self.cross.T).sum()
        products = ((weights @ self.gram) * weights).sum()
        offset = 2 * bias.dot(weights @ self.features - self.targets)
        error = self.squares - 2 * crossed + products + offset + self.count * bias.dot(bias)
        return float(error.clamp_min(0))

    def is_finite(self) -> bool:
        """Whether all features and targets were."""
        return all(bool(sums.isfinite().all()) for sums in (self.gram, self.cross, self.targets))

    def solve(self) -> tuple[Tensor, Tensor]:
        """The weights (K, D) and the bias (K), zeros if not `centred`.

        The penalty is the one with the least error by generalized cross-validation.
        """
        share = float(self.centred) / self.count
        mean, middle = self.features * share, self.targets * share
        gram = self.gram - self.features.outer(mean)
        cross = self.cross - self.features.outer(middle)
        squares = self.squares - self.targets.dot(middle)
        values, vectors = torch.linalg.eigh(gram)
        values, turned = values.clamp_min(0), vectors.T @ cross
        unit = (values.sum() / self.count).clamp_min(torch.finfo(torch.float64).tiny)
        found = []
        for strength in STRENGTHS:
            shrunk = values + strength * unit
            explained = (turned.square().sum(1) * (2 * shrunk - values) / shrunk.square()).sum()
            freedom = self.count - (values / shrunk).sum() - float(self.centred)
            error = (squares - explained).clamp_min(0) / freedom.clamp_min(1e-9).square()
            found.append((float(error), shrunk))
        _, shrunk = min(found, key=lambda pair: pair[0])
        weights = (vectors @ (turned / shrunk[:, None])).T
        return weights, middle - weights @ mean
