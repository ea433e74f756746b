"""How the codes that an activation keeps of its input come to the adapters that read its value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from lightning_da3.ops.adapter import KeptInput
from lightning_da3.ops.masks import computed_twice
from lightning_da3.torch_private.autograd import version_of


class SharedCodes:
    """What an activation keeps in one call, for those who read its value.

    It speaks of one tensor, as the activation returned it: what hooks put in its place, or wrote
    into it, does not follow from the codes.
    """

    def __init__(self) -> None:
        self.value: Tensor | None = None
        self.kept: KeptInput | None = None
        self.version = 0

    def put(self, value: Tensor, kept: KeptInput) -> None:
        """Say what an activation's value follows from."""
        self.value, self.kept = value, kept
        self.version = _version(value)

    def of(self, x: Tensor) -> KeptInput | None:
        """What `x` follows from; None: nothing of it is kept."""
        same = self.value is x and self.version == _version(x)
        return self.kept if same else None


def _version(x: Tensor) -> int:
    return 0 if torch.compiler.is_compiling() else version_of(x)


class Reader(Protocol):
    """Where a host begins."""

    def reads_every_position(self, x: Tensor, /) -> bool:
        """Whether an adapter would keep all of `x`."""


class CodesWanted(nn.Module):
    """Whether an activation shall keep codes of its input: only where an adapter has use of them.

    Args:
        readers: The hosts that read the activation's value; referred to, not owned.
    """

    def __init__(self, readers: Sequence[Reader]) -> None:
        super().__init__()
        self.readers = tuple(readers)

    def forward(self, x: Tensor) -> SharedCodes | None:
        """Where the codes go, for the activation of `x`; None: it keeps what it keeps by itself."""
        if not (torch.is_grad_enabled() and x.requires_grad) or computed_twice():
            return None
        wanted = any(reader.reads_every_position(x) for reader in self.readers)
        return SharedCodes() if wanted else None
