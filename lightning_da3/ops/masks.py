"""What a region of a network decided, for the second time that it is computed.

A ReLU decides for every element whether its gradient passes, a Hardswish where its slope jumps.
Computed again from codes, an element near that point may fall on the other side, and all of its
gradient with it: a far greater error than that of the codes. So a region's decisions are kept: one
bit an element.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from lightning_da3.ops.bits import dense, pack_between, unpack


class _Run(threading.local):
    noted: list[Tensor] | None = None
    waiting: Iterator[Tensor] | None = None


_run = _Run()


@contextlib.contextmanager
def record_masks(needed: bool = True) -> Iterator[list[Tensor]]:
    """The first run: inside, decisions go into the list, if they are `needed`."""
    before = _run.noted, _run.waiting
    noted: list[Tensor] = []
    _run.noted, _run.waiting = noted if needed else None, None
    try:
        yield noted
    finally:
        _run.noted, _run.waiting = before


@contextlib.contextmanager
def replay_masks(noted: Iterable[Tensor]) -> Iterator[None]:
    """Another run: inside, what was decided in the first one is decided again."""
    before = _run.noted, _run.waiting
    _run.noted, _run.waiting = None, iter(noted)
    try:
        yield
    finally:
        _run.noted, _run.waiting = before


def recorded(decide: Callable[[], Tensor]) -> Tensor | None:
    """The decision of the operation that runs now, or None where nothing is computed twice.

    Args:
        decide: Makes the decision, in the first run.
    """
    if _run.waiting is not None:
        return next(_run.waiting)
    if _run.noted is None:
        return None
    decision = decide()
    _run.noted.append(decision)
    return decision


def computed_twice() -> bool:
    """Whether what runs now belongs to a region whose decisions matter."""
    return _run.noted is not None or _run.waiting is not None


def settled(x: Tensor, low: float, high: float) -> Tensor:
    """`x`; in a second run, with every element on its side of the bounds in the first.

    Args:
        x: Any shape.
        low: The lower bound. An element from above `high` must not come back below `low`.
        high: The upper bound; may be infinite.

    Returns:
        A tensor with the gradient of `x`, and its values except those that had changed sides.
    """
    bits = recorded(lambda: pack_between(dense(x), low, high))
    if bits is None or _run.waiting is None:
        return x
    with torch.no_grad():
        inside = unpack(bits, x.size(), dense(x).stride()).bool()
        edge = 1e-2  # half precision still tells it from the bounds
        middle = 0.5 * (low + high) if high < float("inf") else low + 1.0
        outside = torch.where(x > middle, x.clamp(min=high), x.clamp(max=low))
        there = torch.where(inside, x.clamp(low + edge, high - edge), outside)
        shift = there.sub_(x)
    return x + shift
