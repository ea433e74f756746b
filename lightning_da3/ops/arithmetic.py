"""Arithmetic of which nothing is kept, as its operands follow from what autograd keeps anyhow.

Shapes: any that broadcast. Kept: nothing more than what is kept already. The gradient is exact.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_da3.ops.backward import once_differentiable
from lightning_da3.ops.bits import is_recorded
from lightning_da3.torch_private.autograd import transform, version_of

_MOST = 32  # operations that are run again for an operand


@dataclass(frozen=True, eq=False)
class Recipe:
    """How a tensor is computed again.

    Attributes:
        function: Elementwise, without chance; None: the tensor is one that is kept.
        args: What the function is called with: recipes, and constants.
        kwargs: Constants, by name.
        kept: The tensor that is kept.
        version: How often it had been written into.
    """

    function: Callable[..., Tensor] | None = None
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()
    kept: Tensor | None = None
    version: int = 0

    def steps(self) -> Iterator[Recipe]:
        """What comes before it, and itself, in an order in which they can be computed."""
        seen: set[Recipe] = set()
        waiting = [(self, False)]
        while waiting:
            step, ready = waiting.pop()
            if ready:
                yield step
            elif step not in seen:
                seen.add(step)
                waiting.append((step, True))
                waiting += [(arg, False) for arg in step.args if isinstance(arg, Recipe)]

    @property
    def holds(self) -> bool:
        """Whether it is short, and nothing that it begins with was written into since."""
        steps = list(self.steps())
        begins = [(step.kept, step.version) for step in steps if step.kept is not None]
        short = len(steps) - len(begins) <= _MOST
        return short and all(version_of(kept) == version for kept, version in begins)


@dataclass(frozen=True)
class _Place:
    """Where the value of an earlier step is found."""

    index: int


class _Program:
    """Several recipes, without the tensors that they begin with, which are given to it."""

    def __init__(self, recipes: Sequence[Recipe]) -> None:
        steps = list(dict.fromkeys(step for recipe in recipes for step in recipe.steps()))
        places = {step: _Place(i) for i, step in enumerate(steps)}
        self.calls = [
            (s.function, tuple(places[a] if isinstance(a, Recipe) else a for a in s.args), s.kwargs)
            for s in steps
        ]
        self.results = [places[recipe].index for recipe in recipes]

    def run(self, kept: Sequence[Tensor]) -> list[Tensor]:
        """What the recipes give."""
        left, values = iter(kept), list[Tensor]()
        for function, args, kwargs in self.calls:
            if function is None:
                values.append(next(left))
                continue
            known = [values[a.index] if isinstance(a, _Place) else a for a in args]
            values.append(function(*known, **dict(kwargs)))
        return [values[i] for i in self.results]


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        call: Callable[..., Tensor],
        program: _Program,
        read: Sequence[bool],
        kept: Sequence[Tensor],
        *operands: Tensor,
    ) -> Tensor:
        ctx.call, ctx.program, ctx.read = call, program, read
        ctx.like = [(x.size(), x.dtype) for x in operands]
        ctx.save_for_backward(*kept)
        return call(*operands)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, needed = iter(ctx.program.run(ctx.saved_tensors)), ctx.needs_input_grad[4:]
        operands = [
            next(values).detach() if read else grad.new_zeros((), dtype=dtype).expand(size)
            for read, (size, dtype) in zip(ctx.read, ctx.like, strict=True)
        ]
        leaves = [x.requires_grad_() for x, need in zip(operands, needed, strict=True) if need]
        with torch.enable_grad():
            y = ctx.call(*operands)
        found = iter(torch.autograd.grad(y, leaves, grad))
        return *[None] * 4, *[next(found) if need else None for need in needed]


def arithmetic(
    call: Callable[..., Tensor], operands: Sequence[Tensor], recipes: Sequence[Recipe | None]
) -> Tensor:
    """``call(*operands)``; what the gradient reads of the operands is computed again.

    Args:
        call: Elementwise, without chance, writes into nothing; not in autocast.
        operands: What it is called with.
        recipes: Of each operand; None: the gradient does not read it.

    Returns:
        What `call` returns.
    """
    known = [recipe for recipe in recipes if recipe is not None]
    steps = dict.fromkeys(step for recipe in known for step in recipe.steps())
    kept = [step.kept.detach() for step in steps if step.kept is not None]
    read = [recipe is not None for recipe in recipes]
    result: Tensor = _Again.apply(call, _Program(known), read, kept, *operands)
    return result


# --- which arithmetic -----------------------------------------------------------------------------

_SUMS = "add radd sub rsub neg".split()  # keep nothing
_PRODUCTS = "mul multiply rmul".split()  # keep what the gradient of the other operand reads
_OF_OPERANDS = "pow log log1p softplus binary_cross_entropy_with_logits".split()  # keep these
_OF_RESULT = "sigmoid tanh exp sqrt".split()  # keep that
_QUOTIENTS = "truediv div divide true_divide".split()
_KNOWN = {*_SUMS, *_PRODUCTS, *_OF_OPERANDS, *_OF_RESULT, *_QUOTIENTS}
_CONSTANTS = (int, float, str, type(None))  # and bool
_OPERAND = object()
_DATA: Any = (Tensor.data.__get__, Tensor.data.__set__)  # type: ignore[attr-defined]

Call = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class Arithmetic:
    """Calls PyTorch's elementwise functions one after the other, and lets them keep less.

    A loss computes many tensors out of a few, and autograd keeps most of them. Here those are kept
    of which a recipe is not known when they are needed: ``s = sigmoid(x)`` keeps s, and then
    ``(1 - s) ** 2`` and all that is computed of s and of constants keeps nothing more. What a
    recipe begins with is kept by PyTorch as well, so whatever may be written into may be still.

    Args:
        smallest: Elements; of smaller tensors nothing is noted.
    """

    def __init__(self, smallest: int) -> None:
        self.smallest = smallest
        # each with how often the tensor had been written into
        self._recipes: Any = WeakTensorKeyDictionary()
        self._kept: Any = WeakTensorKeyDictionary()

    def called(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], call: Call
    ) -> Any:
        """What a function returns.

        Args:
            func: A function of PyTorch, or a method.
            args: What it is called with.
            kwargs: What it is called with by name.
            call: Calls it otherwise.
        """
        name = getattr(func, "__name__", "").removeprefix("__").removesuffix("__")
        if func in _DATA:  # what is written by it, no version tells
            self._recipes.clear(), self._kept.clear()
        if name not in _KNOWN or not self._may(args, kwargs):
            return call(func, args, kwargs)
        operands = [x for x in args if isinstance(x, Tensor)]
        recipes, read = [self._recipe(x) for x in operands], _read(name, operands)
        used = [recipe if it_is else None for recipe, it_is in zip(recipes, read, strict=True)]
        known = [recipe for recipe in used if recipe is not None]
        saves = name in _OF_RESULT or any(recipe.kept is None for recipe in known)
        if saves and known and len(known) == sum(read) and all(recipe.holds for recipe in known):
            result = arithmetic(_of_operands(func, args, kwargs), operands, used)
        else:
            result = call(func, args, kwargs)
            if not isinstance(result, Tensor):
                return result  # Python asks the other operand
            if result.requires_grad and not isinstance(result.grad_fn, BackwardCFunction):
                for x in [result] if name in _OF_RESULT else itertools.compress(operands, read):
                    self._kept[x] = version_of(x)
        self._note(result, func, args, kwargs)
        return result

    def _note(
        self,
        result: Tensor,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """See how a result is computed again, if its operands are."""
        steps = tuple(self._recipe(a) if isinstance(a, Tensor) else a for a in args)
        unknown = any(isinstance(a, Tensor) and s is None for a, s in zip(args, steps, strict=True))
        recipe = Recipe(func, steps, tuple(kwargs.items()))
        if not unknown and recipe.holds:
            self._recipes[result] = (recipe, version_of(result))

    def _may(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether its arguments are large tensors of numbers, the first one too, and constants."""
        others = [a for a in (*args, *kwargs.values()) if not isinstance(a, Tensor)]
        if not isinstance(args[0], Tensor) or not all(isinstance(a, _CONSTANTS) for a in others):
            return False
        tensors = [a for a in args if isinstance(a, Tensor)]
        by_name = any(isinstance(a, Tensor) for a in kwargs.values())
        known = not by_name and all(map(self._is_known, tensors))
        return known and transform() is None and not is_recorded()

    def _is_known(self, x: Tensor) -> bool:
        plain = x.layout == torch.strided and x.is_floating_point() and not x.is_inference()
        return plain and x.numel() >= self.smallest and not torch.is_autocast_enabled(x.device.type)

    def _recipe(self, x: Tensor) -> Recipe | None:
        version = version_of(x)
        recipe, written = self._recipes.get(x, (None, version))
        if recipe is not None and written == version:
            return recipe  # type: ignore[no-any-return]
        return Recipe(kept=x, version=version) if self._kept.get(x) == version else None


def _read(name: str, operands: Sequence[Tensor]) -> list[bool]:
    """Which operands the gradient reads the values of."""
    needs = [x.requires_grad for x in operands]
    if name in _SUMS or not any(needs):
        return [False] * len(operands)
    if name in _PRODUCTS:
        return needs[::-1] if len(needs) == 2 else [False]
    if name in _QUOTIENTS:
        return [needs[1], True] if len(needs) == 2 else [False]
    return [True] * len(operands)


def _of_operands(
    func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[..., Tensor]:
    """The call as a function of its tensors, of which it holds none."""
    constants = [_OPERAND if isinstance(a, Tensor) else a for a in args]

    def call(*operands: Tensor) -> Tensor:
        left = iter(operands)
        return func(*[next(left) if a is _OPERAND else a for a in constants], **kwargs)

    return call
