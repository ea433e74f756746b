"""Pictures of what was learned and what was forgotten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_da3.errors import ConfigError
from lightning_da3.plotting.figure import axes_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BAR = "#0072B2"
FLOOR = 0.5  # accuracy of the darkest colour, where no accuracy is lower


def plot_accuracy_matrix(matrix: Tensor, domains: Sequence[str]) -> Figure:
    """Accuracy on every domain, after each domain was learned.

    Args:
        matrix: (D, D) of fractions: rows after a domain, columns on a domain, NaN stays blank; see
            `lightning_da3.metrics.AccuracyMatrix.compute`.
        domains: The D domains' names.

    Raises:
        ConfigError: The shapes do not fit.
        DA3Error: Matplotlib is not installed.
    """
    figure, axes = axes_of(None, 2.9 + 0.95 * len(domains), 1.9 + 0.75 * len(domains))
    draw_accuracy_matrix(axes, matrix, domains)
    return figure


def draw_accuracy_matrix(axes: Axes, matrix: Tensor, domains: Sequence[str]) -> None:
    """Draw what `plot_accuracy_matrix` does.

    Args:
        axes: Where.
        matrix: See there.
        domains: See there.

    Raises:
        ConfigError: The shapes do not fit.
    """
    matrix, count = matrix.detach().float().cpu(), len(domains)
    if matrix.dim() == 0:
        matrix = matrix.reshape(1, 1)  # what torchmetrics makes of one domain
    if matrix.shape != (count, count):
        raise ConfigError(
            f"`matrix` must be ({count}, {count}) for the domains {list(domains)}, got "
            f"{tuple(matrix.shape)}."
        )
    known = matrix[~matrix.isnan()]
    low = min(FLOOR, float(known.min())) if known.numel() else 0.0
    shown = axes.imshow(matrix.numpy(), cmap="cividis", vmin=low, vmax=1.0)
    for row in range(count):
        for column in range(count):
            value = float(matrix[row, column])
            if value == value:  # not NaN
                colour = "black" if value > (low + 1) / 2 else "white"
                axes.text(column, row, f"{100 * value:.1f}", ha="center", va="center", color=colour)
    axes.set_xticks(range(count), list(domains), rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(count), list(domains))
    axes.set_xlabel("accuracy on, in percent")
    axes.set_ylabel("after learning")
    bar = axes.figure.colorbar(shown, ax=axes, format=lambda value, _: f"{100 * value:.0f} %")
    bar.set_label(f"colours begin at {100 * low:.0f} %" if low else "accuracy", fontsize=8)
    bar.outline.set_visible(False)
    axes.set_title(_finding(matrix, domains), fontsize=11, wrap=True)


def _finding(matrix: Tensor, domains: Sequence[str]) -> str:
    """What the matrix says, in words."""
    evaluated = (~matrix.isnan()).any(dim=1).nonzero()
    if not len(evaluated):
        return "Nothing was evaluated"
    last = int(evaluated.max())
    mean = float(matrix[last, : last + 1].nanmean())
    said = f"{100 * mean:.1f} % on average after {domains[last]}"
    lost = (matrix.diagonal() - matrix[last])[:last]
    lost = lost[~lost.isnan()]
    if not lost.numel():
        return said
    if not lost.any():
        return f"{said}; nothing forgotten"
    worst = float(lost.max())
    return f"{said};\n" + (
        f"at most {100 * worst:.1f} points forgotten" if worst > 0 else "earlier ones got better"
    )


def draw_points(
    axes: Axes, points: Mapping[str, float], *, as_fine_tuning: float, most: float
) -> None:
    """Draw the decathlon's points of every domain, with a line at those of fine-tuning.

    Args:
        axes: Where.
        points: By domain; NaN has no bar.
        as_fine_tuning: The points of a domain that is as good as fine-tuned.
        most: The points of a domain without errors.
    """
    known = {name: value for name, value in points.items() if value == value}
    axes.barh(list(points), [known.get(name, 0.0) for name in points], color=BAR)
    for place, name in enumerate(points):
        text = f" {known[name]:.0f}" if name in known else " not evaluated"
        axes.text(known.get(name, 0.0), place, text, va="center", fontsize=8)
    axes.axvline(as_fine_tuning, color="0.2", linestyle="--", label="as many errors as fine-tuning")
    axes.set_xlim(0, 1.12 * most)
    axes.invert_yaxis()
    axes.set_xlabel(f"points; {most:.0f}: no error")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper right", fontsize=8, framealpha=0.9)
    total, tuned = sum(known.values()), as_fine_tuning * len(known)
    axes.set_title(f"{total:.0f} points; fine-tuning has {tuned:.0f}", fontsize=11)
