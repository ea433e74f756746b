"""A picture of what was learned and what was forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_da3.errors import ConfigError
from lightning_da3.plotting.figure import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_accuracy_matrix(matrix: Tensor, domains: Sequence[str]) -> Figure:
    """Accuracy on every domain, after each domain was learned.

    Args:
        matrix: (D, D) of fractions: rows after a domain, columns on a domain, NaN stays blank; see
            `lightning_da3.metrics.AccuracyMatrix.compute`.
        domains: The D domains' names.

    Raises:
        ConfigError: The shapes do not fit.
    """
    matrix = matrix.detach().float().cpu()
    count = len(domains)
    if matrix.dim() == 0:
        matrix = matrix.reshape(1, 1)  # what torchmetrics makes of one domain
    if matrix.shape != (count, count):
        raise ConfigError(
            f"`matrix` must be ({count}, {count}) for the domains {list(domains)}, got "
            f"{tuple(matrix.shape)}."
        )
    figure = new_figure(2.6 + 0.95 * count, 1.9 + 0.75 * count)
    axes = figure.add_subplot()
    known = matrix[~matrix.isnan()]
    low = min(0.5, float(known.min())) if known.numel() else 0.0
    shown = axes.imshow(matrix.numpy(), cmap="cividis", vmin=low, vmax=1.0)
    for row in range(count):
        for column in range(count):
            value = float(matrix[row, column])
            if value == value:  # not NaN
                colour = "black" if value > (low + 1) / 2 else "white"
                axes.text(column, row, f"{100 * value:.1f}", ha="center", va="center", color=colour)
    axes.set_xticks(range(count), list(domains), rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(count), list(domains))
    axes.set_xlabel("accuracy on")
    axes.set_ylabel("after learning")
    bar = figure.colorbar(shown, ax=axes, format=lambda value, _: f"{100 * value:.0f} %")
    bar.outline.set_visible(False)
    figure.suptitle("Accuracy by domain, in percent", fontsize=12)
    return figure
