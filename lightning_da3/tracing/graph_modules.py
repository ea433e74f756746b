"""Graphs in the places of modules, which others may still ask what they asked those modules."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from lightning_da3.torch_private.modules import FORWARD_HOOKS, HOOKS_WITH_KWARGS, hooks_of

_HOOKS = (*FORWARD_HOOKS, *HOOKS_WITH_KWARGS)
_OF_LAYER = "holds_one_layer"
LAYER = "layer"  # name of the one layer in the graph of a single layer


class UserGraph(fx.GraphModule):
    """The graph of a module of the user's, whose attributes it has, in copies and files, too.

    That of a single layer answers as the layer does: `weight`, `bias`, `stride`.
    """

    def __getattr__(self, name: str) -> Any:
        """What its one layer has under this name."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if not is_of_layer(self):  # a child of the user's may have the name that ours has
                raise
            return getattr(self._modules[LAYER], name)

    def __deepcopy__(self, memo: Any) -> UserGraph:
        """A copy; that of `torch.fx` has what the graph names alone, and no hooks."""
        twin: Any = super().__deepcopy__(memo)
        own = copy.deepcopy(_attributes(self), memo)
        vars(twin).update({k: v for k, v in own.items() if k not in vars(twin)})
        for new, hooks in zip(hooks_of(twin, _HOOKS), hooks_of(self, _HOOKS), strict=True):
            new.update(copy.deepcopy(hooks, memo))
        return twin  # type: ignore[no-any-return]

    def __reduce__(self) -> tuple[Any, ...]:
        """Files hold what `torch.fx` writes of a graph, which is of no subclass."""
        return _read, super().__reduce__()


def _read(function: Callable[..., fx.GraphModule], args: tuple[Any, ...]) -> fx.GraphModule:
    gm = function(*args)
    type(gm).__bases__ = (UserGraph,)  # torch.fx makes a class for every graph
    return gm


def graph_of_module(module: nn.Module, graph: fx.Graph) -> UserGraph:
    """A module's graph, with what a Python parent may read of its child, and hooks on it."""
    gm = UserGraph(module, graph, class_name=type(module).__name__)
    read = {**_of_class(module), **_attributes(module)}
    vars(gm).update({k: v for k, v in read.items() if k not in vars(gm)})
    for ours, theirs in zip(hooks_of(gm, _HOOKS), hooks_of(module, _HOOKS), strict=True):
        ours.update(theirs)
    return gm


def graph_of_layer(layer: nn.Module) -> UserGraph:
    """A graph that calls one layer."""
    graph = fx.Graph()
    graph.output(graph.call_module(LAYER, (graph.placeholder("input"),)))
    gm = UserGraph({LAYER: layer}, graph, class_name=type(layer).__name__)
    vars(gm).update({k: v for k, v in _attributes(layer).items() if k not in vars(gm)})
    vars(gm)[_OF_LAYER] = True
    return gm


def is_of_layer(module: nn.Module) -> bool:
    """Whether a module is the graph of one layer, which it holds by a name of ours."""
    return _OF_LAYER in vars(module)


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if not name.startswith("_")}


def _of_class(module: nn.Module) -> dict[str, Any]:
    """Plain values that a module's class has, or computes as properties."""
    found: dict[str, Any] = {}
    for kind in reversed(type(module).__mro__):
        if kind.__module__.split(".")[0] in ("torch", "builtins"):
            continue
        for name, value in vars(kind).items():
            if name.startswith("_") or not isinstance(value, (property, *_PLAIN)):
                continue
            with contextlib.suppress(Exception):  # the user's own property: anything can come
                value = getattr(module, name)
                if isinstance(value, _PLAIN):
                    found[name] = value
    return found


_PLAIN = (type(None), bool, int, float, str, tuple, list)
