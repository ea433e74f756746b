"""Which cases of a test run where."""

from collections.abc import Iterable
from typing import Any

import pytest


def others_slow(cases: Iterable[Any], *quick: Any) -> list[Any]:
    """All of the cases; those that are not named are slow."""
    return [c if c in quick else pytest.param(c, marks=pytest.mark.slow) for c in cases]


def others_by_hand(cases: Iterable[Any], *slow: Any) -> list[Any]:
    """All of the cases: those that are named are slow, the others run by hand."""
    marks = {True: pytest.mark.slow, False: pytest.mark.exhaustive}
    return [pytest.param(c, marks=marks[c in slow]) for c in cases]
