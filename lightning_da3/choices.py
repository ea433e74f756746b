"""Checks of what a user chose, all of whose problems are reported at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeGuard

from lightning_da3.errors import ConfigError


def require(problems: list[str], condition: bool, message: str) -> None:
    """Note a problem, unless a condition holds."""
    if not condition:
        problems.append(message)


def refuse(problems: list[str]) -> None:
    """Raise what was noted.

    Raises:
        ConfigError: There are problems.
    """
    if problems:
        raise ConfigError(" ".join(problems))


def is_int(value: object) -> TypeGuard[int]:
    """Whether a value is an int, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite(value: object) -> TypeGuard[float]:
    """Whether a value is a number that a float can hold, and no bool."""
    try:
        return (
            isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        )
    except OverflowError:  # of an int
        return False


def is_one_of(value: object, choices: Sequence[str]) -> bool:
    """Whether a value is one of these texts."""
    return isinstance(value, str) and value in choices
