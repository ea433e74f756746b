"""Tables and phrases that costs are printed in."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_da3.memory import StepPrediction


def table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines of a table; columns of figures stand to the right.

    Args:
        rows: The rows, all as long, the headings first.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = [
        any(cell[:1].isdigit() for cell in column[1:]) and i > 0
        for i, column in enumerate(zip(*rows, strict=True))
    ]
    return [
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in rows
    ]


def ratio(before: float | None, after: float) -> str:
    """How many times less the second is."""
    return f"{before / after:.1f}x" if before and after else ""


def where(step: StepPrediction) -> str:
    """The place and the phase of a step's peak."""
    name = step.peak_node.removeprefix("backbone.")
    return f"{name or 'the loss'}, {step.peak_phase}"
