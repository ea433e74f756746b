"""What a rounding may decide otherwise: an order, a yes or no, a whole number out of others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_da3.torch_private.fake import TorchDispatchMode
from lightning_da3.torch_private.kernels import kernel_of
from lightning_da3.torch_private.trees import tree_leaves
from lightning_da3.verifying.differences import difference, has_norm

_aten = torch.ops.aten
# they return values beside where these stood, along the axis that is this argument
_CHOICES = {
    **dict.fromkeys((_aten.sort, _aten.cummax, _aten.cummin, _aten.max, _aten.min), 1),
    **dict.fromkeys((_aten.median, _aten.nanmedian, _aten.mode), 1),
    **dict.fromkeys((_aten.topk, _aten.kthvalue), 2),
}
_STEPS = {_aten.floor, _aten.ceil, _aten.round, _aten.trunc, _aten.sign, _aten.floor_divide}


@dataclass(frozen=True)
class _Decision:
    """One that was made.

    Attributes:
        tensors: What it was made on.
        result: Whole numbers, a yes or no for each element, or steps.
    """

    tensors: Sequence[Tensor]
    result: Tensor


class Decisions(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """In the block decisions are noted; or made as before, where others were noted.

    A network with random weights sorts boxes whose scores hardly differ, and drops those that
    overlap by hardly too much. One that computes the same but for a rounding gets other boxes,
    even another number of them, and gradients of others. Where it decides on what is the same to
    rounding, the decision is the one made before, so that all that follows can be compared.

    Args:
        before: Those that hold; None: they are noted.
        nearly: The largest difference of what is the same to rounding, relative to the norm.
    """

    def __init__(self, before: Decisions | None = None, nearly: float = 0.0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nearly, self.notes = nearly, before is None
        self.made = defaultdict[Any, list[_Decision]](list)
        if before is not None:
            self.made.update((asked, list(made)) for asked, made in before.made.items())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        leaves = tree_leaves((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        decided = _decided(func, tensors, result)
        if decided is None:
            return result
        others = tuple(str(x) for x in leaves if not isinstance(x, Tensor))
        asked = (func, others, tuple((x.shape, x.dtype) for x in tensors))
        if self.notes:
            kept = [x.detach().clone() for x in tensors]
            self.made[asked].append(_Decision(kept, decided.clone()))
            return result
        before = self._before(self.made[asked], tensors)
        if before is None or isinstance(result, Tensor):
            return result if before is None else before
        position = _CHOICES[kernel_of(func)]
        axis = kwargs.get("dim", args[position] if len(args) > position else -1)
        return _at(tensors[0], before, axis), before

    def _before(self, made: list[_Decision], tensors: Sequence[Tensor]) -> Tensor | None:
        """What was decided on the same; of several the one taken longest ago."""
        for i, decision in enumerate(made):
            if all(map(self._same, tensors, decision.tensors)):
                made.append(made.pop(i))  # what is computed again decides again
                return decision.result.clone()
        return None

    def _same(self, x: Tensor, y: Tensor) -> bool:
        return difference(x, y) <= self.nearly if has_norm(x) else torch.equal(x, y)


def _decided(func: Any, tensors: Sequence[Tensor], result: Any) -> Tensor | None:
    """What an operation decided on values; None: it computed them."""
    kernel = kernel_of(func)
    if not any(map(has_norm, tensors)):
        return None
    if isinstance(result, Tensor):
        written = kernel is _aten.view or any(result is x for x in tensors)
        return None if written or (has_norm(result) and kernel not in _STEPS) else result
    return result[1] if kernel in _CHOICES else None


def _at(x: Tensor, indices: Tensor, axis: int) -> Tensor:
    """The elements of x that the indices name along an axis, which may be gone from them."""
    if indices.dim() == x.dim():
        return x.gather(axis, indices)
    return x.gather(axis, indices.unsqueeze(axis)).squeeze(axis)
