"""Writing into a part of a tensor, as a function that changes nothing."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from lightning_da3.layers import register
from lightning_da3.tracing.probes import PROBED


def with_item(x: Tensor, index: Any, value: Any) -> Tensor:
    """What x is after ``x[index] = value``."""
    result = x.clone()
    result[index] = value
    return result


register(with_item, keeps="nothing", pure=True)


def may_be_written(index: Any) -> bool:
    """Whether an index is made of numbers and slices: others select by values, or in any order."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(_is_place(part) for part in parts)


def _is_place(part: Any) -> bool:
    if isinstance(part, slice):
        return all(map(_is_place, (part.start, part.stop, part.step)))
    if isinstance(part, fx.Proxy):
        probed = part.node.meta.get(PROBED)
        return probed is not None and type(probed[0]) is int
    return part is None or part is Ellipsis or type(part) is int


def puts_back(node: fx.Node, written: fx.Node) -> bool:
    """Whether `node` is the second half of ``x[index] += y``, and `written` the first."""
    if node.target is not with_item or node.args[2] is not written:
        return False
    part = written.args[0]
    return isinstance(part, fx.Node) and part.args[:2] == node.args[:2]
