"""The matrix of accuracies, and all that is read from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from lightning_da3.metrics import functional
from lightning_da3.metrics.counts import checked_domains, count_right, place_in
from lightning_da3.plotting.accuracies import draw_accuracy_matrix
from lightning_da3.plotting.figure import axes_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class AccuracyMatrix(Metric):
    """Accuracy on every domain, after each domain was learnt.

    Row i, column j of the matrix is the accuracy on domain j once domain i was the last one learnt;
    NaN where nothing was evaluated. Repeated updates of a cell pool their samples, and so do
    processes. The numbers read from it are those of `lightning_da3.metrics.functional`.

    Args:
        domains: Names in the order in which they are learnt.
        kwargs: What every metric of torchmetrics takes.

    Raises:
        DomainError: If there is no name, or one comes twice.

    Example:
        >>> matrix = AccuracyMatrix(["flowers", "birds"])
        >>> matrix.update("flowers", "flowers", torch.tensor([0, 1]), torch.tensor([0, 1]))
        >>> matrix.update("birds", "flowers", torch.tensor([0, 1]), torch.tensor([0, 0]))
        >>> matrix.update("birds", "birds", torch.tensor([2, 1]), torch.tensor([2, 1]))
        >>> matrix.compute()
        tensor([[1.0000,    nan],
                [0.5000, 1.0000]])
        >>> matrix.backward_transfer()
        tensor(-0.5000)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    correct: Tensor  # (D, D) counts
    total: Tensor  # (D, D) counts

    def __init__(self, domains: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.domains = checked_domains(domains)
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
        row = place_in(self.domains, "after", after)
        column = place_in(self.domains, "on", on)
        right, count = count_right(preds, target)
        self.correct[row, column] += right
        self.total[row, column] += count

    def compute(self) -> Tensor:
        """The matrix (D, D): rows after a domain, columns on a domain, NaN where not evaluated.

        Torchmetrics makes a scalar of it if there is only one domain.
        """
        return self.correct / self.total  # 0 / 0 is NaN

    def average_accuracy(self) -> Tensor:
        """See the function of that name; so the others."""
        return functional.average_accuracy(self.compute())

    def forgetting(self) -> dict[str, Tensor]:
        """Forgetting by domain name."""
        return dict(zip(self.domains, functional.forgetting(self.compute()), strict=True))

    def backward_transfer(self) -> Tensor:
        """What learning later domains did to earlier ones."""
        return functional.backward_transfer(self.compute())

    def forward_transfer(self, untrained: Tensor) -> Tensor:
        """What learning earlier domains did for later ones.

        Args:
            untrained: The accuracy (D,) of an untrained network on each domain.

        Raises:
            ConfigError: It does not fit.
        """
        return functional.forward_transfer(self.compute(), untrained)

    @override
    def plot(self, val: Tensor | None = None, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw the matrix.

        Args:
            val: What `compute` gave; None: what it gives now.
            ax: Where to draw; None: in a new figure.

        Raises:
            DA3Error: Matplotlib is not installed.
        """
        figure, axes = axes_of(ax, 2.6 + 0.95 * len(self.domains), 1.9 + 0.75 * len(self.domains))
        draw_accuracy_matrix(axes, self.compute() if val is None else val, self.domains)
        return figure, axes
