"""Gradient checkpointing: fine-tuning that computes every block again in the backward pass.

Chen et al., "Training deep nets with sublinear memory cost" (2016), as `torch.utils.checkpoint`
does it. What is learned is what fine-tuning learns, to the bit: batch norm takes each batch into
its running statistics once, not again when a block is computed again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from comparison.methods.blocks import blocks
from comparison.methods.plain import NORMS, fine_tuning


class Checkpointed(nn.Module):
    """A block that keeps its input and runs again in the backward."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        again: Tensor = checkpoint(
            self.block,
            x,
            use_reentrant=False,
            context_fn=lambda: (contextlib.nullcontext(), _statistics_stay(self.block)),
        )
        return again


def checkpoint_blocks(network: nn.Module) -> nn.Module:
    """The network with every block checkpointed, in its place."""
    for name, block in list(blocks(network)):
        network.set_submodule(name, Checkpointed(block))
    return network


def checkpointing(network: nn.Module) -> nn.Module:
    """Fine-tuning with checkpoints."""
    return checkpoint_blocks(fine_tuning(network))


@contextlib.contextmanager
def _statistics_stay(block: nn.Module) -> Iterator[None]:
    """Batch norm in it computes as before, and leaves its running statistics as they are."""
    norms = [m for m in block.modules() if isinstance(m, NORMS)]
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0  # of what is new
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked = norm.num_batches_tracked.clone()
    try:
        yield
    finally:  # computing again ends with an exception, once nothing more is needed
        for norm, momentum, count in before:
            norm.momentum, norm.num_batches_tracked = momentum, count
