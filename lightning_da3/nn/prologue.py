"""The frozen prologue of a network, which takes a large batch in microbatches.

Nothing before the first host is trained, so nothing of it is kept; but its maps are the largest of
the network, and those of a whole batch would be the peak of a training step. Shapes: (N, ..) in and
out, of any number of samples at once. Kept: nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_da3.memory import Microbatched
from lightning_da3.ops.bits import dense, has_no_values
from lightning_da3.ops.exportable import is_exportable

# no map is larger, unless one sample's is: caches hold it, and memory above 32 MiB goes back
# to the system whenever it is freed (glibc), so that every step would wait for new pages
LARGEST_BYTES = 12 * 2**20
# In a file. ONNX Runtime holds every map of a piece for the same map of the next, so that pieces
# should be small; but each of them is written out.
MOST_PIECES = 8


class Prologue(Microbatched):
    """Runs the prologue on as many samples at once as its largest map allows.

    The whole batch runs at once where a graph is built, off the CPU, under compilers, and in files
    for batches of any size.

    Args:
        piece: Maps samples (N, ..) and constants to a tuple of (N, ..), every sample by itself.
        axes: The number of axes of the samples, N among them.
        growth: Elements of the largest value for every element of the samples.
    """

    piece: nn.Module

    def __init__(self, piece: nn.Module, axes: int, growth: float) -> None:
        super().__init__()
        # referred to, not owned: its layers stay where the user's network has them
        object.__setattr__(self, "piece", piece)
        self.axes, self.growth = axes, growth

    def forward(self, x: Any, *constants: Any) -> tuple[Tensor, ...]:
        """(N, ..) to tensors of N samples."""
        samples = self._samples(x)
        if samples is None or samples >= len(x) or self._builds_a_graph(x):
            return self.piece(x, *constants)  # type: ignore[no-any-return]
        if has_no_values(x):
            return self._predicted(x, samples, *constants)
        if is_exportable():  # programs have no memory to write into
            samples = min(samples, -(-len(x) // MOST_PIECES))
            pieces = [self.piece(part, *constants) for part in torch.split(x, samples)]
            return tuple(torch.cat(results) for results in zip(*pieces, strict=True))
        whole: list[Tensor] = []
        for i, part in enumerate(torch.split(x, samples)):
            results = self.piece(part, *constants)
            whole = whole or [_of_all(y, len(x)) for y in results]
            for y, everything in zip(results, whole, strict=True):
                everything.narrow(0, i * samples, len(part)).copy_(y)
            del results, y
        return tuple(whole)

    def _samples(self, x: Any) -> int | None:
        """The number of samples that may go through at once; None: all."""
        traced = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        if torch.compiler.is_compiling() or traced:
            return None
        if is_exportable() and not (isinstance(x, Tensor) and isinstance(x.shape[0], int)):
            return None
        if not isinstance(x, Tensor) or x.dim() != self.axes or not x.is_cpu or len(x) < 2:
            return None
        itemsize = x.itemsize if x.is_floating_point() else torch.get_default_dtype().itemsize
        largest = self.growth * itemsize * x.numel() / len(x)
        fitting = max(1, int(LARGEST_BYTES // max(1.0, largest)))
        samples = 1 << (fitting.bit_length() - 1)  # a power of two, as batches mostly are
        if self.account is not None:
            self.account.met(samples, len(x))
        elif has_no_values(x):
            return None
        return samples

    def _builds_a_graph(self, x: Tensor) -> bool:
        trains = x.requires_grad or any(p.requires_grad for p in self.piece.parameters())
        return torch.is_grad_enabled() and trains

    def _predicted(self, x: Tensor, samples: int, *constants: Any) -> tuple[Tensor, ...]:
        """`forward` without values: from the third on, microbatches take no more memory."""
        assert self.account is not None
        rest = len(x) - samples
        second = min(rest, samples)
        results = self.piece(x.narrow(0, 0, samples), *constants)
        whole = [_of_all(y, len(x)) for y in results]
        del results
        self.piece(x.narrow(0, samples, second), *constants)
        if rest > second:
            with self.account.aside():
                self.piece(x.narrow(0, samples + second, rest - second), *constants)
        return tuple(whole)


def _of_all(y: Tensor, count: int) -> Tensor:
    """Memory for `count` samples, each laid out as in `y`."""
    like = dense(y)
    strides = (y.shape[1:].numel(), *like.stride()[1:])
    return like.new_empty_strided((count, *y.shape[1:]), strides)
