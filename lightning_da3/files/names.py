"""Names of domains, which are names of their files, too."""

from __future__ import annotations

import re

from lightning_da3.errors import DomainError
from lightning_da3.formatting import shown

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")


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
