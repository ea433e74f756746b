"""Lightning's summary of a model, with the names and classes of the user's network."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
from lightning.pytorch.utilities.model_summary.model_summary import ModelSummary
from torch import nn
from typing_extensions import override

from lightning_da3.errors import DA3Error
from lightning_da3.model.model import DA3Model


class UsersSummary(ModelSummary):
    """Shows converted networks as the user wrote them.

    Parameters of a part are those that it computes with: frozen ones, and the active domain's.

    Args:
        model: The LightningModule.
        max_depth: See `ModelSummary`.
    """

    def __init__(self, model: L.LightningModule, max_depth: int = 1) -> None:
        self._holder, self._depth = model, max_depth
        super().__init__(model, max_depth)

    @property
    @override
    def named_modules(self) -> list[tuple[str, nn.Module]]:
        if self._depth == 0:
            return []
        found = [*_rows(self._holder, "")][1:]
        return [(n, m) for n, m in found if self._depth < 0 or n.count(".") < self._depth]

    @property
    @override
    def total_layer_params(self) -> int:
        own = self._holder.parameters(recurse=False)  # else all are of some row, or of a domain
        return self.total_parameters - sum(p.numel() for p in own)


def _rows(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """A module and what is in it, by their paths."""
    shown = _network_of(module) if isinstance(module, DA3Model) else None
    if shown is None:
        yield path, module
        inner = module
    else:
        yield path, _row(shown, module)
        inner = shown
    dot = f"{path}." if path else ""
    for name, child in inner.named_children():
        for where, row in _rows(child, dot + name):
            yield where, row if shown is None or isinstance(row, Row) else _row(row)


def _network_of(model: DA3Model) -> nn.Module | None:
    try:
        return model.network  # type: ignore[no-any-return]
    except DA3Error:  # a model that was saved forgets it
        return None


class Row(nn.Module):
    """Stands for a part of the user's network in a summary.

    Args:
        part: The part, to be read.
        computes: What computes it, whose calls show its sizes; None: that is not shown.
    """

    def __init__(self, part: nn.Module, computes: nn.Module | None) -> None:
        super().__init__()
        self.held, self.training = [*part.parameters()], part.training
        self.computes = [computes]

    @override
    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return iter(self.held)

    @override
    def register_forward_hook(self, *args: Any, **kwargs: Any) -> Any:
        computes = self.computes[0]
        if computes is None:
            return super().register_forward_hook(*args, **kwargs)
        return computes.register_forward_hook(*args, **kwargs)


def _row(part: nn.Module, computes: nn.Module | None = None) -> Row:
    kind: Any = type(type(part).__name__, (Row,), {})
    return kind(part, computes)  # type: ignore[no-any-return]
