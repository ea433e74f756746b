"""The user's model to graphs. Reads, never edits.

A model that `torch.fx` can trace becomes one graph. Where a module's forward cannot be traced
(control flow on data, lists of dictionaries), that module stays Python and its children are traced
in their places, down to single layers.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx, nn

from lightning_da3.layers import has_frozen_form
from lightning_da3.torch_private.modules import FORWARD_HOOKS, HOOKS_WITH_KWARGS, hooks_of
from lightning_da3.tracing.checks import check_convertible
from lightning_da3.tracing.copying import frozen_copy
from lightning_da3.tracing.graphs import Part, Traced
from lightning_da3.tracing.normalizing import normalize_
from lightning_da3.tracing.tracer import Tracer, traced_graph

LAYER = "layer"  # name of the one layer in the graph of a single layer


def trace(model: nn.Module, python: Mapping[str, str] | None = None) -> Traced:
    """A frozen copy of `model` in eval, as one graph or as islands of graphs.

    Args:
        model: Any module; left unchanged.
        python: Modules that must stay Python, and why, by their paths. So do those that hold them;
            what they hold is traced.

    Raises:
        ConversionError: The model cannot be copied, is quantized, or has layers without weights.
    """
    check_convertible(model)
    twin = frozen_copy(model)
    network = type(twin).__name__
    islands = _Islands(twin, python or {})
    root = islands.convert(twin, "")
    return Traced(root, tuple(islands.parts), islands.python, network)


class _Islands:
    """Finds the largest parts of a model that can be traced."""

    def __init__(self, model: nn.Module, kept: Mapping[str, str]) -> None:
        self.kept = {id(model.get_submodule(path)): (path, why) for path, why in kept.items()}
        self.parts: list[Part] = []
        self.python: dict[str, str] = {}
        self.done: dict[int, nn.Module] = {}  # a module may be registered in two places

    def convert(self, module: nn.Module, path: str) -> nn.Module:
        """`module`, a graph of it, or itself with graphs inside."""
        if id(module) in self.done:
            return self.done[id(module)]
        result = self._convert(module, path)
        self.done[id(module)] = result
        return result

    def _convert(self, module: nn.Module, path: str) -> nn.Module:
        holder = isinstance(module, (nn.ModuleList, nn.ModuleDict))
        reason = self._must_stay(module)
        if path and not holder and Tracer().is_leaf_module(module, path):
            if reason is not None and id(module) in self.kept:
                self.python[path] = f"{type(module).__name__}: {reason}"
                return module
            if not has_frozen_form(module):
                return module
            gm = _single(module)
            self.parts.append(Part(path, gm, single=True))
            return gm
        if reason is None and path:
            reason = _called_by_name(module)
        if reason is None:
            try:
                gm = _graph(module, whole=path == "")
            except Exception as error:  # noqa: BLE001  # the user's own forward: anything can come
                reason = str(error).split("\n")[0]
            else:
                self.parts.append(Part(path, gm))
                return gm
        if not holder:
            self.python[path] = f"{type(module).__name__}: {reason}"
        for name, child in module.named_children():
            prefix = f"{path}.{name}" if path else name
            setattr(module, name, self.convert(child, prefix))
        return module

    def _must_stay(self, module: nn.Module) -> str | None:
        """Why the caller wants `module` to stay Python, if that is so."""
        for inside in module.modules() if self.kept else ():
            if id(inside) in self.kept:
                path, why = self.kept[id(inside)]
                return why if inside is module else f"it holds {path}, which stays Python"
        return None


def _graph(module: nn.Module, *, whole: bool) -> fx.GraphModule:
    graph = traced_graph(module, whole=whole)
    normalize_(graph, module)
    for node in graph.nodes:
        node.type = None  # an annotation may be a string, with which a graph cannot be pickled
    gm = fx.GraphModule(module, graph, class_name=type(module).__name__)
    _keep_attributes_(gm, module)
    return gm


def _keep_attributes_(gm: fx.GraphModule, module: nn.Module) -> None:
    """What a Python parent may read of its child, and hooks on the child as a whole."""
    for name, value in vars(module).items():
        if not name.startswith("_") and name not in vars(gm):
            vars(gm)[name] = value
    kinds = (*FORWARD_HOOKS, *HOOKS_WITH_KWARGS)
    for ours, theirs in zip(hooks_of(gm, kinds), hooks_of(module, kinds), strict=True):
        ours.update(theirs)


def _single(layer: nn.Module) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.call_module(LAYER, (graph.placeholder("input"),)))
    gm = fx.GraphModule({LAYER: layer}, graph, class_name=type(layer).__name__)
    for name, value in vars(layer).items():  # such as out_channels
        if not name.startswith("_") and name not in vars(gm):
            vars(gm)[name] = value
    return gm


def _called_by_name(module: nn.Module) -> str | None:
    """Why a parent may need more of `module` than to call it."""
    known = set(dir(nn.Sequential)) | set(dir(nn.ModuleDict))
    own = [
        name
        for kind in type(module).__mro__
        if not kind.__module__.startswith(("torch.nn.modules.", "builtins"))
        for name, value in vars(kind).items()
        if callable(value) and not name.startswith("_") and name not in known
    ]
    return f"it has methods that others may call: {', '.join(sorted(set(own)))}" if own else None
