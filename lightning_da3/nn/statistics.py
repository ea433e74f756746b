"""What the samples of one domain look like to the backbone: a Gaussian over pooled features.

Shapes: N samples, D features, K factors. The covariance is ``F F' + diag(v)`` with F (D, K): the
directions in which samples vary most, and what is left, feature by feature. So a domain keeps
D (K + 2) numbers instead of D * D, which for many networks would outweigh the domain itself, and
unlike a diagonal it knows which features move together.
Sources: Lee et al., "A Simple Unified Framework for Detecting Out-of-Distribution Samples and
Adversarial Attacks", arXiv 1807.03888 (Gaussians over a network's pooled features of several
depths); Tipping, Bishop, "Probabilistic Principal Component Analysis", 1999 (the factors); Ledoit,
Wolf, "A Well-Conditioned Estimator for Large-Dimensional Covariance Matrices", 2004 (shrinkage).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributions import LowRankMultivariateNormal

from lightning_da3.errors import InputError

FACTORS = 16
SHRINKAGE = 0.1  # share of the spread that is taken to be alike, and independent, in all features


class Statistics(nn.Module):
    """A Gaussian over features; the standard one before `fit`.

    Args:
        sizes: Numbers of features of every place in the network that they were read at.
    """

    mean: Tensor
    variances: Tensor
    factors: Tensor

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        features = sum(sizes)
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("variances", torch.ones(features))  # v
        self.register_buffer("factors", torch.zeros(features, FACTORS))

    def fit(self, batches: Iterable[Tensor]) -> None:
        """Estimate everything in one pass.

        Args:
            batches: Features, each (N, D).

        Raises:
            InputError: There are fewer than two samples, or some are not finite.
        """
        count, total, products = 0, torch.zeros(()).double(), torch.zeros(()).double()
        for batch in batches:
            x = batch.double().cpu()
            count, total, products = count + len(x), total + x.sum(0), products + x.T @ x
        if count < 2:
            raise InputError(
                f"Statistics need at least 2 samples, got {count}. Give more batches, as a list or "
                "a loader: an iterator that was used before is empty."
            )
        if not bool(torch.isfinite(products).all()):
            raise InputError("The batches lead to NaN or infinite features. Clean the data first.")
        mean = total / count
        covariance = (products - count * torch.outer(mean, mean)) / (count - 1)
        # places differ in scale: the spread of a feature leans to what is usual at its own place
        own = covariance.diagonal().clamp_min(0)
        usual = [part.mean().expand_as(part) for part in torch.split(own, list(self.sizes))]
        scale = (own + SHRINKAGE * torch.cat(usual)).sqrt().clamp_min(1e-6)
        correlation = covariance / torch.outer(scale, scale)
        values, directions = torch.linalg.eigh(correlation)
        values, directions = values[-FACTORS:].clamp_min(0), directions[:, -FACTORS:]
        left = (correlation.diagonal() - (directions.square() * values).sum(1)).clamp_min(0)
        factors = ((1 - SHRINKAGE) * values).sqrt() * directions * scale.unsqueeze(1)
        self.mean.copy_(mean)
        self.variances.copy_(((1 - SHRINKAGE) * left + SHRINKAGE) * scale.square())
        self.factors.zero_()[:, : len(values)] = factors  # fewer, if there are fewer features

    def log_likelihood(self, features: Tensor) -> Tensor:
        """(N, D) to (N,), in float64 on the CPU."""
        mean, variances, factors = (
            part.double().cpu() for part in (self.mean, self.variances, self.factors)
        )
        gaussian = LowRankMultivariateNormal(mean, factors, variances, validate_args=False)
        likelihood: Tensor = gaussian.log_prob(features.double().cpu())  # type: ignore[no-untyped-call]
        return likelihood
