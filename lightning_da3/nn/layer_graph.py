"""The graph of one layer, in a module that stays Python and reads what it likes of its layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

LAYER = "layer"  # its name in the graph


class LayerGraph(fx.GraphModule):
    """A graph that calls one layer, and answers as that layer does: `weight`, `bias`, `stride`."""

    def __getattr__(self, name: str) -> Any:
        """What the layer has under this name."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            layer = self.__dict__.get("_modules", {}).get(LAYER)
            if layer is None:
                raise
            return getattr(getattr(layer, "original", layer), name)

    def __reduce__(self) -> tuple[Any, ...]:
        """Files hold what `torch.fx` writes of a graph, which is of no subclass."""
        return _read, super().__reduce__()  # type: ignore[no-untyped-call]


def _read(function: Callable[..., fx.GraphModule], args: tuple[Any, ...]) -> fx.GraphModule:
    gm = function(*args)
    type(gm).__bases__ = (LayerGraph,)  # torch.fx makes a class for every graph
    return gm
