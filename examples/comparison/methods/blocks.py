"""The blocks of a network: the modules that stand in rows, such as residual blocks."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def blocks(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Name and module of every block: a child of a Sequential that has children of its own."""
    for name, child in module.named_children():
        full = f"{prefix}{name}"
        in_row = type(module) is nn.Sequential and any(child.children())
        if in_row and type(child) is not nn.Sequential:
            yield full, child
        else:
            yield from blocks(child, f"{full}.")
