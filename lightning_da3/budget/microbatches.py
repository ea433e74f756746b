"""A batch that goes through a network in pieces, and comes out whole.

The backbone is held in eval and adapters normalise every sample by itself, so that pieces compute
what the whole batch does. What an operation holds for a moment is then as large as one piece. What
the backward needs stays, unless a piece runs without a graph and is computed again: autograd runs a
later piece's backward before an earlier one's, so the first pieces are computed again last, when
all others are gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_da3.errors import InputError
from lightning_da3.nn.gate import Executed
from lightning_da3.ops.recomputed import recomputed
from lightning_da3.torch_private.trees import TreeSpec, tree_flatten, tree_unflatten

Ledger = list[tuple[str, Executed]]
Run = Callable[..., tuple[Any, Ledger]]


@dataclass(frozen=True)
class Microbatches:
    """How a batch goes through a network.

    Attributes:
        samples: Of a piece, at most.
        again: So many pieces, from the first on, keep nothing and are computed again.
    """

    samples: int
    again: int = 0

    def counts(self, batch_size: int) -> list[int]:
        """Samples of every piece, all alike but for one."""
        pieces = -(-batch_size // self.samples)
        least, more = divmod(batch_size, max(1, pieces))
        return [least + (i < more) for i in range(pieces)]


def batch_size(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    """Samples along axis 0 of what a network takes first; None if that is a list."""
    first = next(iter([*args, *kwargs.values()]), None)
    if isinstance(first, Mapping):
        first = next(iter(first.values()), None)
    return len(first) if isinstance(first, Tensor) and first.dim() else None


def cut(value: Any, counts: Sequence[int]) -> Iterator[Any]:
    """The parts of a batch: tensors with all samples along axis 0 are cut, all else is in each.

    Args:
        value: Any nesting of tensors.
        counts: Samples of every part.
    """
    leaves, structure = tree_flatten(value)
    total, start = sum(counts), 0
    for count in counts:
        part = [
            x.narrow(0, start, count)
            if isinstance(x, Tensor) and x.dim() and len(x) == total
            else x
            for x in leaves
        ]
        yield tree_unflatten(part, structure)
        start += count


def run_microbatches(
    run: Run,
    args: Any,
    kwargs: Any,
    counts: Sequence[int],
    again: int = 0,
    parameters: Sequence[Tensor] = (),
) -> tuple[Any, Ledger]:
    """What ``run(*args, **kwargs)`` returns, from pieces of the batch.

    Args:
        run: Gives an output, and by host what was executed.
        args: What it takes.
        kwargs: Likewise.
        counts: Samples of every piece.
        again: So many pieces, from the first on, are computed again in the backward.
        parameters: Trainable tensors that `run` uses by itself.

    Raises:
        InputError: Outputs are not of one sample each along axis 0.
    """
    outputs, ledgers = [], []
    for i, (some, named) in enumerate(cut((args, kwargs), counts)):
        if i < again:
            output, ledger = _run_again(run, some, named, tuple(parameters))
        else:
            output, ledger = run(*some, **named)
        outputs.append(output)
        ledgers.append(ledger)
    del output  # beside the whole no piece's own stays
    return _joined(outputs, counts), _joined_ledger(ledgers)


def _run_again(
    run: Run, args: Any, kwargs: Any, parameters: tuple[Tensor, ...]
) -> tuple[Any, Ledger]:
    """``run``, whose graph is built in the backward, for as long as it takes."""
    leaves, structure = tree_flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    shape: list[tuple[TreeSpec, int, list[tuple[str, float]]]] = []

    def piece(*tensors: Any) -> tuple[Any, ...]:
        given = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            given[place] = tensor
        some, named = tree_unflatten(given, structure)
        output, ledger = run(*some, **named)
        values, spec = tree_flatten(output)
        shape[:] = [(spec, len(values), [(host, done.macs) for host, done in ledger])]
        return (*values, *(done.gate for _, done in ledger))

    x, *rest = (leaves[place] for place in places)
    results = recomputed(piece, x, *rest, exact=True, parameters=parameters, random=True)
    ((spec, count, hosts),) = shape
    gates = results[count:]
    ledger = [(host, Executed(g, macs)) for (host, macs), g in zip(hosts, gates, strict=True)]
    return tree_unflatten(list(results[:count]), spec), ledger


def _joined(outputs: list[Any], counts: Sequence[int]) -> Any:
    """One output of those of the pieces, which are let go one tensor after the other."""
    opened = [tree_flatten(output) for output in outputs]
    outputs.clear()
    columns = [list(column) for column in zip(*(leaves for leaves, _ in opened), strict=False)]
    structure, sizes = opened[0][1], {len(leaves) for leaves, _ in opened}
    if len(sizes) > 1 or any(spec != structure for _, spec in opened):
        raise InputError(f"Outputs of pieces of the batch are not built alike.{_OTHER_WAY}")
    del opened
    return tree_unflatten([_one(column, counts) for column in columns], structure)


def _one(column: list[Any], counts: Sequence[int]) -> Any:
    """Empties `column`."""
    if all(isinstance(x, Tensor) for x in column):
        rest = column[0].shape[1:]
        if [x.shape for x in column] == [(count, *rest) for count in counts]:
            whole = torch.cat(column)
            column.clear()
            return whole
        shapes = f"a tensor of shape {tuple(column[0].shape)}"
    elif all(x == column[0] for x in column):
        return column[0]
    else:
        shapes = f"a {type(column[0]).__name__} that differs between them"
    raise InputError(
        f"The network returns {shapes} for {counts[0]} samples, which cannot be joined to the "
        f"output of a whole batch.{_OTHER_WAY}"
    )


_OTHER_WAY = (
    " If the training step's loss is a mean over samples, MemoryConfig(split='accumulate') splits "
    "the step instead of the network."
)


def _joined_ledger(ledgers: Sequence[Ledger]) -> Ledger:
    """Of all pieces; hosts are called in the same order in each."""
    joined = []
    for entries in zip(*ledgers, strict=True):
        host, first = entries[0]
        joined.append((host, Executed(torch.cat([done.gate for _, done in entries]), first.macs)))
    return joined
