"""Which learning rates are tried: a method's grid, then on behind its end while the end is best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

LADDER = tuple(float(f"{digit}e{power}") for power in range(-7, 2) for digit in (1, 3))

Found = Callable[[float], dict[str, Any] | None]  # accuracy and loss at a rate, if it was tried


def rates_to_try(grid: Sequence[float], most: int, found: Found) -> list[float]:
    """The grid, and as much beyond it as what is `found` so far says.

    Args:
        grid: Ascending, of the `LADDER`. One alone is taken as it is: nothing is beyond it.
        most: So many rates at most.
        found: What validation images say at a rate.
    """
    rates = list(grid)
    while 1 < len(rates) < most and all(found(rate) is not None for rate in rates):
        at = rates.index(best_rate(rates, found))
        if 0 < at < len(rates) - 1:
            break
        step = -1 if at == 0 else 1
        beyond = LADDER.index(rates[at]) + step
        if not 0 <= beyond < len(LADDER):
            break
        rates.insert(0 if at == 0 else len(rates), LADDER[beyond])
    return rates


def best_rate(rates: Sequence[float], found: Found) -> float:
    """The most accurate of those that were tried; of equal ones, that with less loss."""

    def said(rate: float) -> tuple[float, float]:
        tried = found(rate)
        return (-1.0, 0.0) if tried is None else (tried["accuracy"], -tried["loss"])

    return max(rates, key=said)
