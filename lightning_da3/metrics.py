"""Metrics of learning domains one after the other. Accuracies are fractions from 0 to 1."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_da3.errors import ConfigError, DomainError


class AccuracyMatrix(Metric):
    """Accuracy on every domain, after each domain was learnt.

    Row i, column j of the matrix is the accuracy on domain j once domain i was the last one learnt;
    NaN where nothing was evaluated. Repeated updates of a cell pool their samples.

    Args:
        domains: Names in the order in which they are learnt.

    Raises:
        DomainError: If there is no name, or one comes twice.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    correct: Tensor  # (D, D) counts
    total: Tensor  # (D, D) counts

    def __init__(self, domains: Sequence[str]) -> None:
        super().__init__()
        self.domains = tuple(domains)
        repeated = sorted({name for name in self.domains if self.domains.count(name) > 1})
        if isinstance(domains, str) or not self.domains or repeated:
            raise DomainError(
                "`domains` must be a sequence of one or more different names, "
                f"got {domains!r}" + (f" with {repeated} more than once." if repeated else ".")
            )
        zeros = torch.zeros(len(self.domains), len(self.domains), dtype=torch.long)
        self.add_state("correct", zeros.clone(), dist_reduce_fx="sum")
        self.add_state("total", zeros.clone(), dist_reduce_fx="sum")

    def update(self, after: str, on: str, preds: Tensor, target: Tensor) -> None:
        """Adds a batch to one cell.

        Args:
            after: The domain learnt last.
            on: The domain that the batch is from.
            preds: Scores (N, C, ...), of which the highest counts, or labels (N, ...).
            target: Labels (N, ...).

        Raises:
            DomainError: If a name is unknown.
            ConfigError: If the shapes do not fit.
        """
        row, column = self._index("after", after), self._index("on", on)
        labels = preds.argmax(dim=1) if preds.ndim == target.ndim + 1 else preds
        if labels.shape != target.shape:
            raise ConfigError(
                f"`preds` of shape {tuple(preds.shape)} do not fit `target` of shape "
                f"{tuple(target.shape)}. Give scores (N, C, ...) or labels (N, ...) for (N, ...)."
            )
        self.correct[row, column] += (labels == target).sum()
        self.total[row, column] += target.numel()

    def compute(self) -> Tensor:
        """The matrix (D, D): rows after a domain, columns on a domain, NaN where not evaluated.

        Torchmetrics makes a scalar of it if there is only one domain.
        """
        return self.correct / self.total  # 0 / 0 is NaN

    def forgetting(self) -> dict[str, Tensor]:
        """Forgetting by domain name; see the function of that name."""
        return dict(zip(self.domains, forgetting(self.compute()), strict=True))

    def _index(self, argument: str, name: str) -> int:
        if name not in self.domains:
            raise DomainError(
                f"`{argument}` names the unknown domain {name!r}. Known: {', '.join(self.domains)}."
            )
        return self.domains.index(name)


def forgetting(matrix: Tensor) -> Tensor:
    """How much accuracy each domain lost since its best, after the last domain evaluated.

    Negative where a domain is better than ever. NaN for the last domain itself, for those not yet
    learnt, and where an evaluation is missing.

    Args:
        matrix: Accuracies (D, D); see `AccuracyMatrix.compute`.

    Returns:
        Differences of fractions (D,).
    """
    matrix, last = _with_last_row(matrix)
    if last == 0:
        return torch.full_like(matrix[0], torch.nan)
    earlier = matrix[:last]
    learnt = torch.ones_like(earlier, dtype=torch.bool).tril()  # domain j counts from row j on
    best = earlier.masked_fill(~learnt | earlier.isnan(), -torch.inf).amax(dim=0)
    return torch.where(best.isinf(), torch.nan, best - matrix[last])


def average_accuracy(matrix: Tensor) -> Tensor:
    """Mean accuracy over the domains learnt, after the last domain evaluated.

    Args:
        matrix: Accuracies (D, D); see `AccuracyMatrix.compute`.

    Returns:
        A fraction (), NaN if nothing was evaluated.
    """
    matrix, last = _with_last_row(matrix)
    return matrix[last, : last + 1].nanmean()


def _with_last_row(matrix: Tensor) -> tuple[Tensor, int]:
    """The matrix as (D, D), and its last row with an evaluation; 0 if there is none."""
    if matrix.ndim == 0:
        matrix = matrix.reshape(1, 1)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.numel():
        raise ConfigError(f"`matrix` must be (D, D) with D > 0, got {tuple(matrix.shape)}.")
    evaluated = (~matrix.isnan()).any(dim=1).nonzero()
    return matrix, int(evaluated.max()) if len(evaluated) else 0
