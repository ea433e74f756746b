"""Elementwise functions of what is kept anyway: their operands are computed again in the backward.

Shapes: any that broadcast. ``y = f(a, b)`` keeps neither a nor b where both follow, by elementwise
functions, from tensors that autograd keeps for the backward in any case, but those: the very same
memory, so nothing more. Exact.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_da3.ops.recomputed import autocast_of


class Root:
    """A tensor, as long as it lives and nothing is written into it; does not keep it alive."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._version = weakref.ref(tensor), tensor._version

    @property
    def tensor(self) -> Tensor | None:
        """The tensor, None if it is no longer what it was."""
        tensor = self._tensor()
        return tensor if tensor is not None and tensor._version == self._version else None


@dataclass(frozen=True, eq=False)
class Derived:
    """``func(*args, **kwargs)``, to be computed again.

    Attributes:
        func: Elementwise; returns a new tensor.
        args: Numbers, and roots or derived values in the place of tensors.
        kwargs: No tensors.
        roots: All that it goes back to, each once.
        functions: How many are called to compute it.
    """

    func: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    roots: tuple[Root, ...] = field(init=False)
    functions: int = field(init=False)

    def __post_init__(self) -> None:
        derived = [arg for arg in self.args if isinstance(arg, Derived)]
        roots = [arg for arg in self.args if isinstance(arg, Root)]
        roots += [root for arg in derived for root in arg.roots]
        object.__setattr__(self, "roots", tuple(dict.fromkeys(roots)))
        object.__setattr__(self, "functions", 1 + sum(arg.functions for arg in derived))

    def operands(self, kept: Mapping[Root, Tensor]) -> list[Tensor]:
        """The tensors among the arguments, from what the roots were."""
        return [_value(arg, kept) for arg in self.args if isinstance(arg, (Root, Derived))]

    def call(self, operands: Iterable[Tensor]) -> Tensor:
        """The function, of these tensors and its numbers."""
        given = iter(operands)
        args = [next(given) if isinstance(arg, (Root, Derived)) else arg for arg in self.args]
        return self.func(*args, **self.kwargs)


Origin: TypeAlias = Root | Derived
"""Where a tensor comes from."""


def _value(origin: Origin, kept: Mapping[Root, Tensor]) -> Tensor:
    return kept[origin] if isinstance(origin, Root) else origin.call(origin.operands(kept))


class _FromRoots(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, derived: Derived, count: int, *tensors: Tensor) -> Tensor:
        operands, roots = tensors[:count], tensors[count:]
        ctx.derived, ctx.autocast = derived, autocast_of(operands[0].device.type)
        ctx.save_for_backward(*roots)
        return derived.call(operands)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        derived: Derived = ctx.derived
        kept = dict(zip(derived.roots, ctx.saved_tensors, strict=True))
        with ctx.autocast():
            needs = ctx.needs_input_grad[2:]
            operands = [
                operand.detach().requires_grad_(need)
                for operand, need in zip(derived.operands(kept), needs, strict=False)
            ]
            with torch.enable_grad():
                y = derived.call(operands)
        wanted = [operand for operand in operands if operand.requires_grad]
        found = iter(torch.autograd.grad(y, wanted, grad))
        grads = [next(found) if operand.requires_grad else None for operand in operands]
        return None, None, *grads, *[None] * len(kept)


def from_roots(derived: Derived, operands: tuple[Tensor, ...], roots: tuple[Tensor, ...]) -> Tensor:
    """What `derived` stands for, keeping `roots` alone for the gradient.

    Args:
        derived: The function and where its operands come from.
        operands: The tensors among its arguments.
        roots: Those of `derived`, in their order.

    Returns:
        Its value.
    """
    apart = [root.detach() for root in roots]  # no second way for the gradient
    result: Tensor = _FromRoots.apply(derived, len(operands), *operands, *apart)
    return result
