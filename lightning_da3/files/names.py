"""Names of domains, which are names of their files, too."""

from __future__ import annotations

import re
from collections.abc import Iterable

from lightning_da3.errors import DomainError
from lightning_da3.formatting import shown

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
_DEVICE = re.compile(r"CON|PRN|AUX|NUL|(COM|LPT)[0-9]", re.IGNORECASE)  # of Windows


def check_name(name: object) -> None:
    """Refuse what cannot name a domain; what can is a file name everywhere.

    Raises:
        DomainError: The name is ill-formed.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise DomainError(
            f"{shown(name)} cannot name a domain: use 1 to 100 letters, digits, '-' and '_', "
            "beginning with a letter or digit."
        )
    if _DEVICE.fullmatch(name):
        raise DomainError(
            f"{name!r} cannot name a domain: on Windows a file of that name is a device. Use "
            "another name."
        )


def check_apart(name: str, others: Iterable[str]) -> None:
    """Refuse a name whose file would be another's where file systems ignore the case of letters.

    Args:
        name: The domain's name.
        others: Names that are there already; `name` may be one of them.

    Raises:
        DomainError: Another differs from `name` by case alone.
    """
    others = list(others)
    twins = [other for other in others if other.lower() == name.lower() and other != name]
    if twins and name not in others:
        raise DomainError(
            f"{name!r} and {twins[0]!r} differ by case alone, and would be one file on many "
            f"systems. Use {twins[0]!r}, or a name that differs by more."
        )
