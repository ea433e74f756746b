"""Pictures that say it at a glance: accuracy against peak memory, training and inference time."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from comparison.methods import DA3, GATED, METHODS, TUNED
from comparison.tables import Row
from lightning_da3.plotting.figure import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS = "#c1272d"
PALETTE = "#1f4e79 #7f7f7f #2e8b57 #8a6d3b #6a4c93 #17879c #b0632a #c2a500 #d16ba5".split()
OTHERS = dict(zip((name for name in METHODS if not name.startswith(DA3)), itertools.cycle(PALETTE)))
TIME = "time"  # until the end of the curve
LABEL_HEIGHT = 0.055  # of the axes


def plot_memory(rows: Sequence[Row]) -> Figure:
    """Mean accuracy against the peak of a step; up and left is better."""
    label = "peak memory of a training step above the resting model, MiB"
    return _points(rows, "peak MiB", "MiB", label)


def _points(rows: Sequence[Row], column: str, unit: str, label: str) -> Figure:
    figure, axes = _axes(_finding(rows, column, unit))
    points = {}
    for row in rows:
        x, y = row.values[column], 100 * row.mean
        axes.plot([x], [y], "o", markersize=9, color=_colour(row), clip_on=False)
        points[row.method] = (x, y)
    axes.set_xlabel(label)
    _finish(axes, rows, points)
    return figure


def plot_inference(rows: Sequence[Row]) -> Figure:
    """Mean accuracy against the time of an inference; up and left is better."""
    return _points(rows, "inference ms", "ms", "time of an inference of one batch, ms")


def plot_time(rows: Sequence[Row]) -> Figure:
    """Mean accuracy after every epoch against the time of the steps until then."""
    figure, axes = _axes(_finding(rows, TIME, "s of training"))
    points = {}
    for row in rows:
        times, accuracies = zip(*row.curve, strict=True)
        colour = _colour(row)
        percents = [100 * accuracy for accuracy in accuracies]
        axes.plot(times, percents, "-", color=colour, linewidth=2.2 if _ours(row) else 1.3)
        axes.plot(times[-1:], percents[-1:], "o", markersize=8, color=colour, clip_on=False)
        points[row.method] = (times[-1], percents[-1])
    axes.set_xlabel("time of all training steps until then, all domains, s")
    _finish(axes, rows, points)
    return figure


def _finding(rows: Sequence[Row], column: str, unit: str) -> str:
    """What the picture shows, in one line."""
    ours = [row for row in rows if row.method in (DA3, GATED)]
    tuned = next((row for row in rows if row.method == TUNED), None)
    if not ours or tuned is None:
        best = max(rows, key=lambda row: row.mean)
        return f"{best.method} is the most accurate: {_said(best, column, unit)}"
    our = max(ours, key=lambda row: row.mean)
    times = _cost(tuned, column) / _cost(our, column)
    return (
        f"{our.method}: {_said(our, column, unit)}; fine-tuning: {_said(tuned, column, unit)}, "
        f"{times:.1f}x as much"
    )


def _said(row: Row, column: str, unit: str) -> str:
    return f"{100 * row.mean:.1f} % at {_cost(row, column):.0f} {unit}"


def _cost(row: Row, column: str) -> float:
    return row.curve[-1][0] if column == TIME else row.values[column]


def _axes(title: str) -> tuple[Figure, Axes]:
    figure = new_figure(8.6, 5.2)
    axes = figure.add_subplot()
    figure.suptitle(title, fontsize=12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_ylabel("accuracy on test images, mean over domains, %")
    return figure, axes


def _finish(axes: Axes, rows: Sequence[Row], points: dict[str, tuple[float, float]]) -> None:
    """Names beside the axes, in the order of the points, each with a line to its own."""
    axes.set_xlim(0, 1.05 * max(x for x, _ in points.values()))
    low, high = axes.get_ylim()
    low = max(0.0, low - 0.03 * (high - low))
    high = min(100.5, high)
    axes.set_ylim(low, high)
    ordered = sorted(rows, key=lambda row: points[row.method][1])
    wanted = [(points[row.method][1] - low) / (high - low) for row in ordered]
    for row, height in zip(ordered, apart(wanted, LABEL_HEIGHT), strict=True):
        colour = _colour(row)
        axes.annotate(
            row.method,
            points[row.method],
            xytext=(1.04, height),
            textcoords="axes fraction",
            va="center",
            color=colour,
            fontweight="bold" if _ours(row) else "normal",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.5},
            annotation_clip=False,
        )


def apart(heights: Sequence[float], least: float) -> list[float]:
    """Ascending heights, moved as little as a pass up and a pass down need to be `least` apart."""
    moved = list(heights)
    for i in range(1, len(moved)):
        moved[i] = max(moved[i], moved[i - 1] + least)
    if moved and moved[-1] > 1:
        moved[-1] = 1.0
        for i in range(len(moved) - 2, -1, -1):
            moved[i] = min(moved[i], moved[i + 1] - least)
    return moved


def _ours(row: Row) -> bool:
    return row.method.startswith(DA3)


def _colour(row: Row) -> str:
    """The same of a method in every picture."""
    return OTHERS.get(row.method, OURS)
