"""An adapter's forward and backward as one op each that a compiler does not look into.

Inside, the compiler would keep more than eager mode does, and copies of weights in the layouts that
it prefers. Shapes and what is kept: see `lightning_da3.ops.adapter`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_da3.ops.adapter_cells import AdapterOptions, Weights, gradients, respond


def _all_of_it(
    p: Tensor,
    noise: Tensor | None,
    weights: Sequence[Tensor],
    eps: float,
    gated: bool,
    exact: bool,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Addend, what is kept beside p, and the gate if there is one."""
    with torch.no_grad():
        addend, gate, kept = respond(
            p, noise, Weights(*weights), AdapterOptions(eps, gated, exact), dtype
        )
    results = [addend, kept] if gate is None else [addend, kept, gate]
    # a batch of one may be laid out otherwise with values than without
    return [r.contiguous(memory_format=_preferred(r)) for r in results]


def _all_gradients(*arguments: Any) -> list[Tensor]:
    """The gradients of p and all weights; empty where there is none."""
    found = gradients(*arguments)
    empty = torch.empty(0, device=arguments[1].device)
    return [
        empty.clone() if g is None else g.contiguous(memory_format=_preferred(g)) for g in found
    ]


def _preferred(x: Tensor) -> torch.memory_format:
    """A layout that depends on the shape alone: the compiler must know it beforehand."""
    return torch.channels_last if x.dim() == 4 else torch.contiguous_format


_adapt = torch.library.custom_op(
    "lightning_da3::adapt",
    _all_of_it,
    mutates_args=(),
    schema=(
        "(Tensor p, Tensor? noise, Tensor[] weights, float eps, bool gated, bool exact,"
        " ScalarType dtype) -> Tensor[]"
    ),
)
_adapt.register_fake(_all_of_it)  # it computes shapes as well as values
_gradients_op = torch.library.custom_op(
    "lightning_da3::adapt_backward",
    _all_gradients,
    mutates_args=(),
    schema=(
        "(Tensor kept, Tensor hidden, Tensor? noise, Tensor[] weights, Tensor? grad_addend,"
        " Tensor? grad_gate, float eps, bool exact, bool last, int group, SymInt[] size,"
        " ScalarType p_dtype, ScalarType dtype, bool wants_p, bool wants_squeeze) -> Tensor[]"
    ),
)
_gradients_op.register_fake(_all_gradients)


def opaque_adapt(
    p: Tensor,
    noise: Tensor | None,
    w: Weights,
    options: AdapterOptions,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """See `lightning_da3.ops.adapter_cells.respond`; without a graph."""
    addend, kept, *gate = _adapt(
        p, noise, list(w), options.eps, options.gated, options.exact, dtype
    )
    return addend, gate[0] if gate else None, kept


def opaque_gradients(*arguments: Any) -> list[Tensor | None]:
    """See `lightning_da3.ops.adapter_cells.gradients`."""
    return [None if g.numel() == 0 else g for g in _gradients_op(*arguments)]
