"""Numbers as people read and write them."""

from __future__ import annotations

import re

MOST_BYTES = 2**63
UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def format_bytes(number: float) -> str:
    """A number of bytes, in the largest unit in which it is at least one: ``1.5 MiB``."""
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.4g} {unit}"
        number /= 1024
    return f"{number:.4g} GiB"


def bytes_in(text: object) -> int:
    """The bytes that a number with a unit says, such as ``"1.5 GiB"``; 0 if it says none.

    More than any machine has are none, too.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        return text if text < MOST_BYTES else 0
    if not isinstance(text, str):
        return 0
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)\s*", text)
    number = float(found[1]) * UNITS.get(found[2], 0) if found else 0.0
    return int(number) if number < MOST_BYTES else 0


def format_count(number: float) -> str:
    """A number of parameters or FLOPs: ``2.5 M``."""
    for unit in ("", " k", " M", " G"):
        if number < 1000:
            return f"{number:.4g}{unit}"
        number /= 1000
    return f"{number:.4g} T"


def shown(value: object) -> str:
    """A value for an error: as Python shows it, but short."""
    try:
        text = repr(value)
    except ValueError:  # of an int with too many digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:120]}... ({len(text)} characters)"
