"""What a piece of a network decided, for the second time that it is computed.

A ReLU decides for every element whether its gradient passes. Computed again from codes, an element
near zero may fall on the other side, and all of its gradient with it: a far greater error than that
of the codes. So the decisions of such a piece are kept: one bit an element.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator

from torch import Tensor


class _Run(threading.local):
    noted: list[Tensor] | None = None
    waiting: Iterator[Tensor] | None = None


_run = _Run()


@contextlib.contextmanager
def noting(needed: bool = True) -> Iterator[list[Tensor]]:
    """The first run: inside, decisions go into the list, if they are `needed`."""
    before = _run.noted, _run.waiting
    noted: list[Tensor] = []
    _run.noted, _run.waiting = noted if needed else None, None
    try:
        yield noted
    finally:
        _run.noted, _run.waiting = before


@contextlib.contextmanager
def following(noted: Iterable[Tensor]) -> Iterator[None]:
    """Another run: inside, what was decided in the first one is decided again."""
    before = _run.noted, _run.waiting
    _run.noted, _run.waiting = None, iter(noted)
    try:
        yield
    finally:
        _run.noted, _run.waiting = before


def decided(decide: Callable[[], Tensor]) -> Tensor | None:
    """The decision of the operation that runs now, or None where nothing is computed twice.

    Args:
        decide: Makes it, in the first run.
    """
    if _run.waiting is not None:
        return next(_run.waiting)
    if _run.noted is None:
        return None
    decision = decide()
    _run.noted.append(decision)
    return decision
