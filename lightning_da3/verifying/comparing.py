"""How far apart two outcomes are, and how far they may be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_da3.errors import InputError
from lightning_da3.verifying.differences import difference, has_norm, share_of_others
from lightning_da3.verifying.running import Conditions, Outcome

_CODES = 0.1  # of gradients that come from 8-bit codes; measured: 0.01 to 0.03, tiny nets 0.06
_INDICES = 0.02  # of whole numbers: a rounding may decide which of two is larger


@dataclass(frozen=True)
class Tolerance:
    """Largest differences of networks that are the same, relative to the norm.

    Attributes:
        outputs: Of what they return.
        gradients: Of gradients.
    """

    outputs: float
    gradients: float

    @classmethod
    def of(cls, dtype: torch.dtype, *, wide: bool, exact: bool) -> Tolerance:
        """What the rounding of weights and codes comes to; some hundred times what was measured.

        Args:
            dtype: The type that folded weights were rounded to.
            wide: Both networks compute in float64.
            exact: No gradient comes from codes.
        """
        eps = torch.finfo(dtype).eps
        outputs = min((1e2 if wide else 2e3) * eps, 0.2)
        # a rounding decides on which side of a kink an element lies: few, but whole elements
        gradients = min(max(30 * outputs, eps ** (1 / 3)), 0.3)
        return cls(max(outputs, 1e-12), gradients if exact else max(gradients, _CODES))


@dataclass(frozen=True)
class Comparison:
    """One thing that was compared.

    Attributes:
        name: The conditions, and what was compared.
        difference: Relative to the norm of the original's; infinite: of another kind altogether.
        tolerance: The largest difference of networks that are the same.
        note: What differs, if no number says it.
        refused: The converted network says that it does not take such inputs.
    """

    name: str
    difference: float
    tolerance: float
    note: str = ""
    refused: bool = False

    @property
    def ok(self) -> bool:
        """Whether both compute the same."""
        return self.difference <= self.tolerance

    def __str__(self) -> str:
        """A line for people."""
        said = self.note or f"{self.difference:.2g} (at most {self.tolerance:.2g})"
        return f"{self.name}: {said}"


def compare(
    conditions: Conditions, ours: Outcome, theirs: Outcome, tolerance: Tolerance
) -> Iterator[Comparison]:
    """Every comparison of two outcomes under the same conditions.

    Args:
        conditions: How both were run.
        ours: Of the converted network.
        theirs: Of the original. If it raised, there is nothing to compare.
        tolerance: See there.
    """
    name = f"outputs, {conditions.name}"
    if theirs.error is not None:
        return
    if ours.error is not None:
        what = f"it raises {type(ours.error).__name__}: {_line(ours.error)}"
        refused = isinstance(ours.error, InputError)
        yield Comparison(name, torch.inf, tolerance.outputs, what, refused)
        return
    yield _compared(name, ours.outputs, theirs.outputs, tolerance.outputs)
    if ours.changed and not theirs.changed:
        yield Comparison(
            f"arguments, {conditions.name}", torch.inf, 0.0, "it writes into its arguments"
        )
    if not conditions.gradients or theirs.no_gradients is not None:
        return
    name = f"gradients, {conditions.name}"
    if ours.no_gradients is not None:
        what = f"the backward raises {type(ours.no_gradients).__name__}: {_line(ours.no_gradients)}"
        yield Comparison(name, torch.inf, tolerance.gradients, what)
    elif theirs.gradients:
        yield _compared(name, ours.gradients, theirs.gradients, tolerance.gradients)


def _line(error: Exception) -> str:
    return str(error).split("\n")[0]


def _compared(
    name: str, ours: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: float
) -> Comparison:
    kinds = [[(tuple(x.shape), x.dtype) for x in tensors] for tensors in (ours, theirs)]
    if kinds[0] != kinds[1]:
        return Comparison(name, torch.inf, tolerance, f"{_said(kinds[0])} for {_said(kinds[1])}")
    pairs = list(zip(ours, theirs, strict=True))
    whole = [share_of_others(x, y) for x, y in pairs if not has_norm(x)]
    worst = max((difference(x, y) for x, y in pairs if has_norm(x)), default=0.0)
    if max(whole, default=0.0) > _INDICES:
        note = f"{max(whole):.0%} of whole numbers differ"
        return Comparison(name, torch.inf, tolerance, note)
    return Comparison(name, worst, tolerance)


def _said(kinds: list[tuple[tuple[int, ...], torch.dtype]]) -> str:
    return ", ".join(f"{list(shape)} {str(dtype)[6:]}" for shape, dtype in kinds) or "no tensor"
