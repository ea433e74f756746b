"""Figures beside what was asked, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One figure; `asked` is the most it may be, or with `least` the least."""

    network: str
    what: str
    value: float
    unit: str = ""
    asked: float | None = None
    least: bool = False

    @property
    def good(self) -> bool:
        """Whether it is as asked."""
        if self.asked is None:
            return True
        return self.value >= self.asked if self.least else self.value <= self.asked

    def cells(self) -> list[str]:
        """As a row of a table."""
        value = f"{self.value:.1e}" if 0 < self.value < 1e-2 else f"{self.value:.2f}"
        sign = ">=" if self.least else "<="
        asked = "" if self.asked is None else f"{sign} {self.asked:g}"
        verdict = "" if self.asked is None else "pass" if self.good else "FAIL"
        return [self.network, self.what, f"{value} {self.unit}".strip(), asked, verdict]


@dataclass(frozen=True)
class Sizes:
    """How much is done: pixels, steps that must agree, timed steps."""

    image: int
    steps: int
    rounds: int


def table(rows: Sequence[Row]) -> str:
    """Markdown that also reads well on a terminal."""
    cells = [["network", "", "measured", "asked", ""], *[row.cells() for row in rows]]
    widths = [max(len(line[i]) for line in cells) for i in range(5)]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(x, widths, strict=True)) + " |" for x in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)
