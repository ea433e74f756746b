"""The switch that gives every op the form that exported programs can hold.

Inside `exportable` the ops compute the same values and gradients, but with operations that depend
on no values and that every runtime has: no numpy, no bytes read as numbers, no views by strides.
It says nothing of `torch.compile`, which has forms of its own.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class _Here(threading.local):
    on = False


_here = _Here()


def is_exportable() -> bool:
    """Whether the ops that run now in this thread must be exportable."""
    return _here.on


@contextlib.contextmanager
def exportable() -> Iterator[None]:
    """Inside, ops of this thread take their exportable form."""
    before, _here.on = _here.on, True
    try:
        yield
    finally:
        _here.on = before
