"""A batch that goes through a network in microbatches, and comes out whole.

The backbone is held in eval and adapters normalise every sample by itself, so that microbatches
compute what the whole batch does. What an operation holds for a moment is then one microbatch's.
What the backward needs stays, unless a microbatch runs without a graph and is computed again.
Autograd runs the backward of later ones first, so the first are computed again last, when all
others are gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_da3.errors import InputError
from lightning_da3.nn.call import Executed
from lightning_da3.ops.recomputed import recomputed
from lightning_da3.torch_private.trees import (
    TreeSpec,
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_unflatten,
)

Ledger = list[tuple[str, Executed]]
Run = Callable[..., tuple[Any, Ledger]]


@dataclass(frozen=True)
class Microbatches:
    """How a batch goes through a network in microbatches.

    Attributes:
        samples: The largest number of samples in a microbatch.
        again: How many microbatches, counted from the first, keep nothing and are computed again.
    """

    samples: int
    again: int = 0

    def counts(self, batch_size: int) -> list[int]:
        """The number of samples in every microbatch; they differ by one at most."""
        pieces = -(-batch_size // self.samples)
        least, more = divmod(batch_size, max(1, pieces))
        return [least + (i < more) for i in range(pieces)]


# --- the samples of a batch -----------------------------------------------------------------------


def first_of(batch: Any) -> Any:
    """What holds the samples: the first entry of a batch that is a tuple, list or dict."""
    first = batch
    if isinstance(batch, (list, tuple)):
        first = batch[0] if batch else None
    while isinstance(first, Mapping):
        first = next(iter(first.values()), None)
    return first


def samples_in(batch: Any) -> int:
    """The number of samples in a batch.

    Args:
        batch: A tensor or a list of samples; or a tuple, list or dict that begins with one.

    Raises:
        InputError: There is neither.
    """
    first = first_of(batch)
    if isinstance(first, (list, tuple)) or (isinstance(first, Tensor) and first.dim()):
        return len(first)
    raise InputError(
        f"What begins with {type(first).__name__} cannot be split into samples: it must be a "
        "batch, a tensor with samples along axis 0 or a list of samples, or a tuple, list or dict "
        "that begins with one."
    )


def batch_size(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    """The number of samples that a network is called with; None if no tensor holds them."""
    first = first_of((*args, *kwargs.values()))
    return len(first) if isinstance(first, Tensor) and first.dim() else None


def cut(batch: Any, counts: Sequence[int], *, lists: bool = False) -> Iterator[Any]:
    """The parts of a batch.

    Tensors with all samples along axis 0 are cut, whatever holds them; all else is in each part.

    Args:
        batch: Any nesting of tensors.
        counts: The number of samples in every part.
        lists: Cut lists and tuples with one entry for every sample, too.
    """
    batch = tree_map(lambda x: dict(x) if isinstance(x, Mapping) else x, batch)
    total, start = sum(counts), 0
    listed = isinstance(first_of(batch), (list, tuple))

    def is_cut(x: Any) -> bool:
        if isinstance(x, Tensor):
            return x.dim() > 0 and len(x) == total
        if not (lists and isinstance(x, (list, tuple)) and len(x) == total) or x is batch:
            return False
        return listed or not any(map(is_cut, tree_leaves(x)))

    leaves, structure = tree_flatten(batch, is_leaf=is_cut)
    whole = [is_cut(leaf) for leaf in leaves]
    for count in counts:
        part = [_entries(x, start, count) if w else x for x, w in zip(leaves, whole, strict=True)]
        yield tree_unflatten(part, structure)
        start += count


def _entries(x: Any, start: int, count: int) -> Any:
    return x.narrow(0, start, count) if isinstance(x, Tensor) else x[start : start + count]


# --- microbatches through a network ---------------------------------------------------------------


def run_microbatches(
    run_of: Callable[[int, int], Run],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    counts: Sequence[int],
    again: int = 0,
    uses: Sequence[nn.Module] = (),
) -> tuple[Any, Ledger]:
    """What a run on the whole batch returns, from microbatches.

    Args:
        run_of: From a microbatch's first sample and its number of samples to what runs it, which
            gives an output, and by host what was executed.
        args: The positional arguments of a run.
        kwargs: The keyword arguments of a run.
        counts: The number of samples in every microbatch.
        again: How many microbatches, from the first, are computed again in the backward.
        uses: The modules whose parameters a run uses by itself.

    Raises:
        InputError: Outputs are not of one sample each along axis 0.
    """
    outputs, ledgers = [], []
    for i, (some, named) in enumerate(cut((args, kwargs), counts)):
        run = run_of(sum(counts[:i]), counts[i])
        if i < again:
            output, ledger = _run_again(run, some, named, uses)
        else:
            output, ledger = run(*some, **named)
        outputs.append(output)
        ledgers.append(ledger)
    del output  # no microbatch's own stays beside the whole
    return _joined(outputs, counts), _joined_ledger(ledgers)


def check_apart(run: Run, args: Sequence[Any], kwargs: Mapping[str, Any], network: str) -> None:
    """Refuse to split a batch whose samples act on each other; two of them tell.

    Args:
        run: Gives an output, and by host what was executed; it should build no graph.
        args: The positional arguments of `run`.
        kwargs: The keyword arguments of `run`.
        network: The network's name, for the error.

    Raises:
        InputError: They act on each other.
    """
    pair = next(cut((args, kwargs), [2, (batch_size(args, kwargs) or 2) - 2]))
    whole, _ = run(*pair[0], **pair[1])
    with suppress(RuntimeError, InputError, AssertionError):  # of shapes, and of values
        parts, _ = run_microbatches(lambda *_: run, pair[0], pair[1], [1, 1])
        torch.testing.assert_close(parts, whole, rtol=1e-2, atol=1e-2, equal_nan=True)
        return
    raise InputError(
        f"A budget cannot be held by splitting a batch of {network}: samples of a batch act on "
        "each other. Give it smaller batches."
    )


def _run_again(run: Run, args: Any, kwargs: Any, uses: Sequence[nn.Module]) -> tuple[Any, Ledger]:
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
    results = recomputed(piece, x, *rest, exact=True, uses=uses, random=True)
    ((spec, count, hosts),) = shape
    gates = results[count:]
    ledger = [(host, Executed(g, macs)) for (host, macs), g in zip(hosts, gates, strict=True)]
    return tree_unflatten(list(results[:count]), spec), ledger


def _joined(outputs: list[Any], counts: Sequence[int]) -> Any:
    """The output for the whole batch. Those of microbatches are freed tensor by tensor."""
    opened = [tree_flatten(output) for output in outputs]
    outputs.clear()
    columns = [list(column) for column in zip(*(leaves for leaves, _ in opened), strict=False)]
    structure, sizes = opened[0][1], {len(leaves) for leaves, _ in opened}
    if len(sizes) > 1 or any(spec != structure for _, spec in opened):
        raise InputError(f"Outputs of microbatches are not built alike.{_OTHER_WAY}")
    del opened
    return tree_unflatten([_one(column, counts) for column in columns], structure)


def _one(column: list[Any], counts: Sequence[int]) -> Any:
    """One tensor of the output, from those of the microbatches. Empties `column`."""
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
    """What all microbatches executed; hosts are called in the same order in each."""
    joined = []
    for entries in zip(*ledgers, strict=True):
        host, first = entries[0]
        joined.append((host, Executed(torch.cat([done.gate for _, done in entries]), first.macs)))
    return joined
