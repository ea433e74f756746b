"""What a user can mend: one sentence that says what is wrong and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec


class InputError(Exception):
    """Ends the command with its sentence and exit code 2; what is finished stays."""


def listed(names: Iterable[object], most: int = 5) -> str:
    """The first of many names, and how many more there are."""
    names = [str(name) for name in names]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def check_installed(packages: Iterable[str], extra: str) -> None:
    """Raises if one of these packages of an extra is missing, before anything is done."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise InputError(
            f"{listed(missing)} must be installed for what was asked: "
            f"pip install 'lightning-da3[{extra}]'."
        )
