"""The user's model to graphs. Reads, never edits.

A model that `torch.fx` can trace becomes one graph. Where a module's forward cannot be traced
(control flow on data, lists of dictionaries), that module stays Python and its children are traced
in their places, down to single layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn

from lightning_da3.layers import has_frozen_form
from lightning_da3.nn.python import PythonFunction
from lightning_da3.tracing.attempts import Session, note_calls_, traced_graph
from lightning_da3.tracing.checks import check_convertible
from lightning_da3.tracing.copying import frozen_copy
from lightning_da3.tracing.first_calls import as_never_called_
from lightning_da3.tracing.graph_modules import graph_of_layer, graph_of_module
from lightning_da3.tracing.graphs import Part, Traced
from lightning_da3.tracing.interception import names_asked
from lightning_da3.tracing.normalizing import normalize_
from lightning_da3.tracing.probes import PROBED
from lightning_da3.tracing.refusals import first_line
from lightning_da3.tracing.tracer import Tracer

STACK = "nn_module_stack"  # key of a node's meta, where torch.fx notes whose forward called it


def trace(
    model: nn.Module,
    inputs: Sequence[Any] | None = None,
    python: Mapping[str, str] | None = None,
) -> Traced:
    """A frozen copy of `model` in eval, as one graph or as islands of graphs.

    Args:
        model: Any module; left unchanged.
        inputs: Its arguments, if they are known. Only shapes and types count.
        python: Why modules must stay Python, by their paths. What they hold is traced.

    Raises:
        ConversionError: The model cannot be copied, is quantized, or has layers without weights.
    """
    check_convertible(model)
    twin = frozen_copy(model)
    network = type(twin).__name__
    reasons, layers = {}, {}
    for path, why in (python or {}).items():
        layer = twin.get_submodule(path)
        reasons[path] = f"{type(layer).__name__}: {why}"
        if path and Tracer().is_leaf_module(layer, path):
            twin.set_submodule(path, PythonFunction(layer))  # nothing is known of it any more
            layers[path] = reasons[path]
    islands = _Islands(twin, Session(inputs, reasons))
    root = islands.convert(twin, "")
    python = {**islands.python, **layers}
    known = islands.session.inputs or islands.session.guessed
    return Traced(root, tuple(islands.parts), python, islands.functions, network, known)


class _Islands:
    """Finds the largest parts of a model that can be traced.

    Args:
        network: A copy of the model that nobody else uses.
        session: What is known of it.
    """

    def __init__(self, network: nn.Module, session: Session) -> None:
        self.network, self.session = network, session
        self.before = as_never_called_(network)
        self.noted = False
        self.parts: list[Part] = []
        self.python: dict[str, str] = {}
        self.functions: dict[str, str] = {}
        self.done: dict[int, nn.Module] = {}  # a module may be registered in two places

    def convert(
        self, module: nn.Module, path: str, asked: frozenset[str] = frozenset()
    ) -> nn.Module:
        """`module`, a graph of it, or itself with graphs inside.

        Args:
            module: Of the model.
            path: Where it is.
            asked: The names that what calls it, and stays Python, asks for.
        """
        if id(module) in self.done:
            return self.done[id(module)]
        result = self._convert(module, path, asked)
        self.done[id(module)] = result
        return result

    def _convert(self, module: nn.Module, path: str, asked: frozenset[str]) -> nn.Module:
        holder = isinstance(module, (nn.ModuleList, nn.ModuleDict))
        if path and not holder and Tracer().is_leaf_module(module, path):
            if not has_frozen_form(module):
                return module
            gm = graph_of_layer(module)
            self.parts.append(Part(path, gm, single=True))
            return gm
        if isinstance(module, PythonFunction):
            return module
        if path and not self.noted:
            self.noted = True
            note_calls_(self.network, self.session)
            if not self.session.calls:  # nobody knows what its forward hangs there again
                self.before.put()
            if "" in self.python:
                self.session.stays_python(self.network, "")
        reason = self.session.python.get(path)
        called = sorted(asked.intersection(_methods(module)))
        if reason is None and called:
            reason = f"{type(module).__name__}: its methods are called: {', '.join(called)}"
        if reason is None:
            try:
                return self._graph(module, path)
            except Exception as error:  # noqa: BLE001  # the user's own forward: anything can come
                reason = f"{type(module).__name__}: {first_line(error)}"
        if not holder:
            self.python[path] = reason
            self.session.stays_python(self.network, path)
            asked |= names_asked(type(module))
        for name, child in module.named_children():
            prefix = f"{path}.{name}" if path else name
            setattr(module, name, self.convert(child, prefix, asked))
        return module

    def _graph(self, module: nn.Module, path: str) -> fx.GraphModule:
        found = traced_graph(module, self.session, path)
        normalize_(found.graph, module)
        prefix = f"{path}." if path else ""
        self.functions.update({prefix + name: why for name, why in found.functions.items()})
        self.session.python.update({prefix + name: why for name, why in found.python.items()})
        index = len(self.parts)
        for name, child in found.opaque.items():
            owner, _, attribute = name.rpartition(".")
            converted = self.convert(child, prefix + name)
            setattr(module.get_submodule(owner), attribute, converted)
        for node in found.graph.nodes:
            node.type = None  # an annotation may be a string, with which no graph can be pickled
            node.meta.pop(PROBED, None)
            if STACK in node.meta:  # classes of the trace, which hold it, and all of the copy
                stack = node.meta[STACK].items()
                node.meta[STACK] = {key: (name, _kind(module, name)) for key, (name, _) in stack}
        gm = graph_of_module(module, found.graph)
        call = self.session.calls.get(path)
        inputs = None if call is None else call.inputs[0]
        turned = call is not None and _is_turned(call.inputs, self.session.guessed)
        self.parts.insert(index, Part(path, gm, inputs=inputs, turned=turned))
        return gm


def _kind(network: nn.Module, path: str) -> type[nn.Module]:
    """The class of a module of a network, as its user wrote it."""
    try:
        return type(network.get_submodule(path))
    except AttributeError:
        return nn.Module


def _is_turned(probes: Sequence[Sequence[Any]], network: Sequence[Any]) -> bool:
    """Whether a part called with one and two samples more than the network's reads (T, N, C)."""
    more, most = (next((x.shape for x in i if isinstance(x, Tensor)), ()) for i in probes)
    count = next((len(x) for x in network if isinstance(x, Tensor) and x.dim()), 0)
    if len(more) != 3 or len(most) != 3 or most[0] == count + 2:
        return False
    return bool(more[1] == count + 1 and most[1] == count + 2)


def _methods(module: nn.Module) -> set[str]:
    """The names of methods that a module has and PyTorch's containers have not."""
    known = set(dir(nn.Sequential)) | set(dir(nn.ModuleDict))
    return {
        name
        for kind in type(module).__mro__
        if not kind.__module__.startswith(("torch.nn.modules.", "builtins"))
        for name, value in vars(kind).items()
        if callable(value) and not name.startswith("__") and name not in known
    }
