"""What a network is run on to compare it: few samples, small where it takes small ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_da3.layers import CONVS
from lightning_da3.memory.fake import tensors_of
from lightning_da3.torch_private.trees import tree_leaves, tree_map_only
from lightning_da3.tracing.graphs import Traced
from lightning_da3.tracing.guessing import SIDES, guesses

Batch = tuple[Any, ...]

# cheap, and with sides that differ, so that exchanged axes show
_SMALL: dict[int, tuple[tuple[int, ...], ...]] = {
    1: ((96,), (128,)),
    2: ((64, 48), (112, 96)),
    3: ((8, 48, 32), (16, 64, 48)),
}
_CROP = (112, 96)
_TOKENS = 24


@dataclass(frozen=True)
class Known:
    """What is known of a network's arguments.

    Attributes:
        examples: The arguments; None: nobody gave them.
        guesses: Else, their shapes and types, of one sample, most likely first.
        words: An upper bound of whole numbers in guesses.
    """

    examples: Batch | None
    guesses: Sequence[Sequence[Tensor]] = ()
    words: int = 2

    @property
    def choices(self) -> int:
        """How many arguments there are to try, most likely first."""
        return len(self.guesses) if self.examples is None else 1 + self._may_be_cropped

    def batch(self, index: int, samples: int) -> Batch:
        """One of the arguments to try, with at most so many samples."""
        if self.examples is not None:
            cut = first_samples(self.examples, samples)
            return _cropped(cut) if self._may_be_cropped and index == 0 else cut
        generator = torch.Generator().manual_seed(0)
        sized = [(x, (samples, *x.shape[1:])) for x in self.guesses[index]]
        return tuple(
            torch.randn(size, generator=generator).to(x.dtype)
            if x.is_floating_point()
            else torch.randint(self.words, size, generator=generator, dtype=x.dtype)
            for x, size in sized
        )

    @property
    def _may_be_cropped(self) -> bool:
        """Whether a large image is the only argument."""
        images = [x for x in tree_leaves(self.examples) if isinstance(x, Tensor)]
        if len(images) != 1 or images[0].dim() != 4 or not images[0].is_floating_point():
            return False
        return all(n > 2 * m for n, m in zip(images[0].shape[2:], _CROP, strict=True))


def _cropped(batch: Batch) -> Batch:
    """A small piece of the image."""
    rows, columns = _CROP
    return tuple(tree_map_only(Tensor, lambda x: x[..., :rows, :columns], batch))


def words_of(network: nn.Module) -> int:
    """How many words the smallest embedding of a network knows."""
    layers = [m for m in network.modules() if isinstance(m, nn.Embedding)]
    return min((layer.num_embeddings for layer in layers), default=2)


def first_samples(examples: Batch, samples: int) -> Batch:
    """The same arguments with at most so many samples; what has another length stays."""
    tensors = [x for x in tree_leaves(examples) if isinstance(x, Tensor) and x.dim()]
    count = len(tensors[0]) if tensors else 0

    def cut(x: Tensor) -> Tensor:
        return x[:samples] if x.dim() and len(x) == count else x

    return tuple(tree_map_only(Tensor, cut, examples))


def other_batches(batch: Batch) -> Iterator[Batch]:
    """Batches of other values, one sample more and, at first, another size."""
    tensors = [x for x in tree_leaves(batch) if isinstance(x, Tensor)]
    counted = [x for x in tensors if x.dim()]
    count = len(counted[0]) if counted else 0

    def other(x: Tensor) -> Tensor:
        if not (x.dim() and len(x) == count):
            return x
        more = torch.cat([x.flip(0), x[:1]])
        more = more.roll(1, -1) if x.dim() > 1 else more
        return more * 0.7 if x.is_floating_point() else more

    changed = tuple(tree_map_only(Tensor, other, batch))
    if len(tensors) == 1 and count and tensors[0].dim() > 1:
        yield tuple(tree_map_only(Tensor, _resized, changed))
    yield changed


def _resized(x: Tensor) -> Tensor:
    if x.dim() == 2 and x.is_floating_point():
        return x  # features, whose number is fixed
    if x.dim() > 3 and x.shape[-1] != x.shape[-2]:
        return x.transpose(-1, -2).contiguous()
    axis = -2 if x.dim() > 3 or x.is_floating_point() else -1
    return torch.cat([x, x.narrow(axis, 0, (x.shape[axis] + 1) // 2)], axis)


def guessed(traced: Traced) -> list[Sequence[Tensor]]:
    """What a traced network may take, most likely first: the shape and type of every argument.

    Args:
        traced: Before it is rewritten.
    """
    whole = [part.gm for part in traced.parts if part.path == ""]
    found: list[Sequence[Tensor]] = list(guesses(whole[0])) if whole else _of_one_layer(traced.root)
    small = [[_smaller(x, i) for x in first] for first in found[:1] for i in range(len(_SMALL[2]))]
    return [*small, *found]


def _smaller(x: Tensor, i: int) -> Tensor:
    sides = _SMALL.get(x.dim() - 2, ())
    is_image = x.is_floating_point() and tuple(x.shape[2:]) in SIDES.get(x.dim() - 2, ())
    return x.new_empty((*x.shape[:2], *sides[i])) if is_image and sides else x


def _of_one_layer(network: nn.Module) -> list[Sequence[Tensor]]:
    """What a network that stays Python may take: what its first layer does."""
    first = next((m for m in network.modules() if isinstance(m, (*CONVS, nn.Embedding))), None)
    if isinstance(first, nn.Embedding):
        return [[torch.empty((1, _TOKENS), dtype=torch.long, device="meta")]]
    if not isinstance(first, CONVS):
        return []
    shapes = [(1, first.in_channels, *sides) for sides in SIDES[first.weight.dim() - 2]]
    return [[torch.empty(shape, dtype=first.weight.dtype, device="meta")] for shape in shapes]


def batch_for(network: nn.Module, batch: Batch) -> Batch:
    """The batch on the network's device, in float64 if that is the network's type."""
    like = next((t for t in tensors_of(network) if t.is_floating_point()), torch.empty(0))

    def cast(x: Tensor) -> Tensor:
        wide = x.is_floating_point() and like.dtype == torch.double
        return x.to(like.device, torch.double if wide else x.dtype)

    return tuple(tree_map_only(Tensor, cast, batch))
