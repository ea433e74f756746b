"""A figure of matplotlib, without pyplot and its state."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_da3.errors import DA3Error

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size, in inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DA3Error(
            "Pictures need matplotlib, which is not installed: pip install lightning-da3[plot]"
        ) from error
    return Figure(figsize=(width, height), dpi=120, layout="constrained")
