"""The user's model to graphs. Reads, never edits.

A model that `torch.fx` can trace becomes one graph. Where a module's forward cannot be traced
(control flow on data, lists of dictionaries), that module stays Python and its children are traced
in their places, down to single layers.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch.fx
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from lightning_da3.errors import ConversionError
from lightning_da3.registry import has_frozen_form, is_registered

LAYER = "layer"  # name of the one layer in the graph of a single layer


# what subclasses inherit whole
_LAYERS: tuple[type[nn.Module], ...] = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.Linear,
    nn.LayerNorm,
    nn.GroupNorm,
)
_LAYERS += (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Tracer(torch.fx.Tracer):
    """`torch.fx.Tracer` that keeps our own modules whole.

    `torch.fx.symbolic_trace` would look through them and lose every custom backward silently.
    """

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """PyTorch's layers, ours and registered ones are nodes; everything else is looked into."""
        ours = type(m).__module__.startswith("lightning_da3.") or is_registered(type(m))
        return ours or super().is_leaf_module(m, module_qualified_name)


@dataclass(frozen=True)
class Part:
    """One graph of a traced model.

    Attributes:
        path: Of the module that became a graph, as the user's model names it; "" is all of it.
        gm: The graph, with the same weights, call signature and outputs.
        single: It is the graph of one layer.
    """

    path: str
    gm: torch.fx.GraphModule
    single: bool = False

    def user_name(self, target: str) -> str:
        """What the user's model calls the module that `gm` calls `target`."""
        if self.single:
            return self.path
        return f"{self.path}.{target}" if self.path else target

    def name(self, node_name: str) -> str:
        """A node's name, unique in the whole model."""
        return f"{self.path}.{node_name}" if self.path else node_name


@dataclass(frozen=True)
class Traced:
    """A traced model.

    Attributes:
        root: A frozen copy of the model in eval: a GraphModule, or the user's own class with
            GraphModules inside.
        parts: The graphs, in the order in which modules are registered.
        python: Why a module stays Python, by its path.
        network: Name of the model's class.
    """

    root: nn.Module
    parts: tuple[Part, ...]
    python: dict[str, str] = field(default_factory=dict)
    network: str = ""


def trace(model: nn.Module) -> Traced:
    """A frozen copy of `model` in eval, as one graph or as islands of graphs.

    Args:
        model: Any module; left unchanged.

    Raises:
        ConversionError: The model cannot be copied, is quantized, or has layers without weights.
    """
    _check(model)
    twin = _plain(_copy(model).eval().requires_grad_(False))
    network = type(twin).__name__
    islands = _Islands()
    root = islands.convert(twin, "")
    return Traced(root, tuple(islands.parts), islands.python, network)


class _Islands:
    """Finds the largest parts of a model that can be traced."""

    def __init__(self) -> None:
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
        if path and not holder and Tracer().is_leaf_module(module, path):
            if not has_frozen_form(module):
                return module
            gm = _single(module)
            self.parts.append(Part(path, gm, single=True))
            return gm
        reason = None if path == "" else _called_by_name(module)
        if reason is None:
            try:
                gm = _graph(module)
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


def _graph(module: nn.Module) -> torch.fx.GraphModule:
    before = {name: (id(b), b._version) for name, b in module.named_buffers()}
    kept = copy.deepcopy(dict(module.named_buffers()))
    try:
        graph = Tracer().trace(module)
    finally:
        changed = [
            name
            for name, buffer in module.named_buffers()
            if before.get(name) != (id(buffer), buffer._version)
        ]
        for name in changed:
            owner, _, attribute = name.rpartition(".")
            module.get_submodule(owner)._buffers[attribute] = kept[name]
    if changed:
        raise ConversionError(f"its forward changes the buffers {changed}")
    _first_by_position_(graph)
    _drop_unread_items_(graph)
    gm = torch.fx.GraphModule(module, graph, class_name=type(module).__name__)
    _keep_attributes_(gm, module)
    return gm


def _keep_attributes_(gm: torch.fx.GraphModule, module: nn.Module) -> None:
    """What a Python parent may read of its child, and hooks on the child as a whole."""
    for name, value in vars(module).items():
        if not name.startswith("_") and name not in vars(gm):
            vars(gm)[name] = value
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs",
                  "_forward_pre_hooks_with_kwargs"):  # fmt: skip
        getattr(gm, hooks).update(getattr(module, hooks))


def _single(layer: nn.Module) -> torch.fx.GraphModule:
    graph = torch.fx.Graph()
    graph.output(graph.call_module(LAYER, (graph.placeholder("input"),)))
    gm = torch.fx.GraphModule({LAYER: layer}, graph, class_name=type(layer).__name__)
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


def _first_by_position_(graph: torch.fx.Graph) -> None:
    """``layer(input=x)`` becomes ``layer(x)``, so that everything behind finds x in one place."""
    for node in graph.nodes:
        if node.op in ("call_module", "call_function") and not node.args and "input" in node.kwargs:
            node.args = (node.kwargs["input"],)
            node.kwargs = {name: arg for name, arg in node.kwargs.items() if name != "input"}


def _drop_unread_items_(graph: torch.fx.Graph) -> None:
    """``y, weights = attention(x)`` where nobody reads `weights`: one reader less."""
    for node in reversed(list(graph.nodes)):
        if node.target is operator.getitem and not node.users:
            graph.erase_node(node)


def _check(model: nn.Module) -> None:
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise ConversionError(
            f"{type(model).__name__} has layers that were never called, so they have no weights: "
            f"{lazy[:4]}. Run the network once on a batch, then convert it."
        )
    quantized = sorted(_quantized(model))
    if quantized:
        raise ConversionError(
            f"{type(model).__name__} is quantized ({', '.join(quantized[:4])}): its int8 layers "
            "pass no gradient back, so nothing before them could learn. Convert the float network "
            f"that it was made from ({_float_twin(model)}), and quantize after training."
        )


def _quantized(model: nn.Module) -> Iterator[str]:
    for module in model.modules():
        kind = type(module)
        if ".quantized." in f"{kind.__module__}." or kind.__name__ in ("QuantStub", "DeQuantStub"):
            yield kind.__name__


def _float_twin(model: nn.Module) -> str:
    kind = type(model)
    twin = kind.__name__.removeprefix("Quantizable")
    home = kind.__module__.replace(".quantization", "").replace(".quantized", "")
    return f"{home}.{twin}"


def _copy(model: nn.Module) -> nn.Module:
    results = [leaf for m in model.modules() for leaf in tree_leaves(dict(vars(m)))]
    # what a forward left behind belongs to a graph, and refuses to be copied
    memo = {
        id(t): t.detach().clone()
        for t in results
        if isinstance(t, torch.Tensor) and t.grad_fn is not None
    }
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # the user's own __deepcopy__ or state
        raise ConversionError(
            f"{type(model).__name__} cannot be copied, and conversion never edits the caller's "
            f"model: copy.deepcopy failed with: {error}"
        ) from error


def _plain(model: nn.Module) -> nn.Module:
    """`model` without what only matters while it trains or runs compiled; edited in place."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if hasattr(child, "_orig_mod"):  # torch.compile: compile the converted network
                setattr(module, name, child._orig_mod)
        base = _same_layer(type(module))
        if base is not None:
            module.__class__ = base
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    model = getattr(model, "_orig_mod", model)
    return model.requires_grad_(False)


def _same_layer(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The layer of PyTorch that `kind` is in all but its constructor and extra methods."""
    for base in kind.__mro__:
        if base.__module__.startswith("torch.nn.modules."):
            return base if base is not kind and base in _LAYERS else None
        if "forward" in vars(base) or "_conv_forward" in vars(base) or "__call__" in vars(base):
            return None
    return None


def module_of(gm: torch.fx.GraphModule, node: torch.fx.Node) -> nn.Module | None:
    """The module that `node` calls, or None for any other kind of node."""
    if node.op != "call_module":
        return None
    return gm.get_submodule(str(node.target))


def output_node(graph: torch.fx.Graph) -> Any:
    """The one output node."""
    return next(node for node in reversed(graph.nodes) if node.op == "output")
