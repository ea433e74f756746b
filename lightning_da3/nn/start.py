"""The frozen start of a network, which goes through in pieces of the batch.

Nothing before the first host is trained, so nothing of it is kept; but its maps are the largest of
the network, and those of a whole batch would be the peak of a training step. Shapes: (N, ..) in and
out, of any number of samples at once. Kept: nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_da3.memory import CutsItsBatch
from lightning_da3.ops.bits import dense, has_no_values

# no map is larger, if one sample allows: caches hold it, and memory of more than 32 MiB goes back
# to the system whenever it is freed (glibc), so that every step would wait for new pages
LARGEST_BYTES = 24 * 2**20


class InPieces(CutsItsBatch):
    """Runs a piece of the network on as many samples at once as its largest map allows.

    Refers to the piece without owning it: its layers stay where the user's network has them. What
    trains, another device than the CPU, and compilers get the whole batch.

    Args:
        piece: From samples (N, ..) and constants to a tuple of (N, ..); treats every sample by
            itself.
        axes: Of the samples, N among them.
        growth: Elements of its largest value for every element of the samples.
    """

    piece: nn.Module

    def __init__(self, piece: nn.Module, axes: int, growth: float) -> None:
        super().__init__()
        object.__setattr__(self, "piece", piece)
        self.axes, self.growth = axes, growth

    def forward(self, x: Any, *constants: Any) -> tuple[Tensor, ...]:
        """(N, ..) to tensors of N samples."""
        if not self._may_cut(x):
            return self.piece(x, *constants)  # type: ignore[no-any-return]
        self.samples = max(1, int(LARGEST_BYTES // max(1.0, self.growth * x.nbytes / len(x))))
        if len(x) <= self.samples:
            return self.piece(x, *constants)  # type: ignore[no-any-return]
        if has_no_values(x):
            return self._predicted(x, *constants)
        whole: list[Tensor] = []
        for i, part in enumerate(torch.split(x, self.samples)):
            results = self.piece(part, *constants)
            whole = whole or [_of_all(y, len(x)) for y in results]
            for y, everything in zip(results, whole, strict=True):
                everything.narrow(0, i * self.samples, len(part)).copy_(y)
            del results, y
        return tuple(whole)

    def _may_cut(self, x: Any) -> bool:
        if torch.compiler.is_compiling() or torch._C._get_tracing_state():
            return False
        if not isinstance(x, Tensor) or x.dim() != self.axes:
            return False
        return len(x) > 1 and x.is_cpu and not (torch.is_grad_enabled() and x.requires_grad)

    def _predicted(self, x: Tensor, *constants: Any) -> tuple[Tensor, ...]:
        """The same for tensors without values: from the third on, pieces take no more memory."""
        first, second, *others = torch.split(x, [*self._three(len(x))])
        results = self.piece(first, *constants)
        whole = [_of_all(y, len(x)) for y in results]
        del results
        self.piece(second, *constants)
        for other in others:
            with self.aside():
                self.piece(other, *constants)
        return tuple(whole)

    def _three(self, count: int) -> Iterator[int]:
        """Samples of the first two pieces, and of all others together, if there are others."""
        for _ in range(2):
            yield min(count, self.samples)
            count -= self.samples
        if count > 0:
            yield count


def _of_all(y: Tensor, count: int) -> Tensor:
    """Memory for so many samples, laid out as those of `y` are."""
    like = dense(y)
    strides = (y.shape[1:].numel(), *like.stride()[1:])
    return like.new_empty_strided((count, *y.shape[1:]), strides)
