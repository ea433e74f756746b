"""A figure of matplotlib, without pyplot and its state."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_da3.errors import DA3Error

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def has_matplotlib() -> bool:
    """Whether pictures can be drawn."""
    try:
        import matplotlib.figure  # noqa: F401 - a broken one counts as none
    except ImportError:
        return False
    return True


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size, in inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DA3Error(
            "Pictures need matplotlib, which is not installed: pip install lightning-da3[plot]"
        ) from error
    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def axes_of(axes: Axes | None, width: float, height: float) -> tuple[Figure, Axes]:
    """Axes to draw in, and their figure.

    Args:
        axes: The caller's own; None: of a new figure.
        width: Of a new figure, in inches.
        height: Of a new figure, in inches.
    """
    if axes is None:
        figure = new_figure(width, height)
        return figure, figure.add_subplot()
    return axes.get_figure(root=True), axes  # type: ignore[return-value]
