"""Numbers as people read them."""

from __future__ import annotations


def format_bytes(number: float) -> str:
    """A number of bytes, in the largest unit in which it is at least one: ``1.5 MiB``."""
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.4g} {unit}"
        number /= 1024
    return f"{number:.4g} GiB"


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
