"""The user's model to graphs. Reads, never edits.

A model that `torch.fx` can trace becomes one graph. Where a module's forward cannot be traced
(control flow on data, lists of dictionaries), that module stays Python and its children are traced
in their places, down to single layers.
"""

from __future__ import annotations

import builtins
import copy
import inspect
import operator
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch.fx
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lightning_da3.errors import ConversionError, InputError
from lightning_da3.layers import has_frozen_form, is_registered
from lightning_da3.torch_private.autograd import version_of
from lightning_da3.torch_private.modules import (
    ASSERTION,
    FORWARD_HOOKS,
    HOOKS_WITH_KWARGS,
    hooks_of,
    original_of,
)
from lightning_da3.torch_private.trees import tree_leaves
from lightning_da3.tracing.normalizing import DERIVED, call_layers_

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

    Args:
        defaults: Arguments of the traced forward that are what they are by default, so that it may
            branch on them.
    """

    def __init__(self, defaults: Container[str] = ()) -> None:
        super().__init__()
        self.defaults = defaults

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """PyTorch's layers, ours and registered ones are nodes; everything else is looked into."""
        ours = type(m).__module__.startswith("lightning_da3.") or is_registered(type(m))
        return ours or super().is_leaf_module(m, module_qualified_name)

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: Any, *others: Any, **named: Any
    ) -> Any:
        """An argument that is what it is by default stays in the signature, and is checked."""
        proxy = super().create_proxy(kind, target, args, kwargs, *others, **named)
        if kind != "placeholder" or target not in self.defaults or not args:
            return proxy
        self._noted(must_be_default, (proxy, target, args[0]))
        return args[0]

    def _noted(self, function: Callable[..., Any], args: tuple[Any, ...]) -> torch.fx.Proxy:
        """A call of what only copies know how to trace if they are told (`torch.fx.wrap`)."""
        proxy = super().create_proxy("call_function", function, args, {})
        proxy.node.meta["is_wrapped"] = True
        return proxy

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> torch.fx.Graph:
        """The graph of `root`, which may take the `len` of a tensor."""
        length = builtins.len

        def proxy_length(value: Any) -> Any:
            if isinstance(value, torch.fx.Proxy):
                return self._noted(length, (value,))
            return length(value)

        with mock.patch.object(builtins, "len", proxy_length):
            return super().trace(root, concrete_args)


def must_be_default(value: Any, name: str, default: Any) -> None:
    """Refuse an argument that the traced forward branches on.

    Raises:
        InputError: It is not what it is by default.
    """
    if value is not default and value != default:
        raise InputError(
            f"`{name}` was traced as {default!r}, which the network's forward branches on. To use "
            f"it, convert a module whose forward always passes `{name}` on to the network."
        )


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


def _graph(module: nn.Module, *, whole: bool) -> torch.fx.GraphModule:
    graph = _traced(module, whole=whole)
    call_layers_(graph, module)
    _first_by_position_(graph)
    _settle_ranks_(graph, module)
    _drop_unread_items_(graph)
    _name_what_was_overwritten_(graph, module)
    gm = torch.fx.GraphModule(module, graph, class_name=type(module).__name__)
    _keep_attributes_(gm, module)
    return gm


def _traced(module: nn.Module, *, whole: bool) -> torch.fx.Graph:
    """The graph of `module`, if need be with its optional arguments as they are by default.

    A Python parent may pass others, so that is for the `whole` network alone.
    """
    options = {
        name: parameter.default
        for name, parameter in inspect.signature(module.forward).parameters.items()
        if isinstance(parameter.default, (type(None), bool, int, float, str))
    }
    absent = {name for name, default in options.items() if default is None}
    free = _attempt(module, ())
    if isinstance(free, Exception) and not (whole and options):
        raise free
    if not absent and not isinstance(free, Exception):
        return free
    fixed = _attempt(module, absent)
    if isinstance(fixed, Exception):
        fixed = _attempt(module, options)
    if isinstance(free, Exception):
        if isinstance(fixed, Exception):
            raise fixed
        return fixed
    # a proxy is never None: a forward that asks for None was not told the truth
    if isinstance(fixed, Exception) or _operations(fixed) == _operations(free):
        return free
    if not whole:
        raise ConversionError(f"it asks whether {sorted(absent)} are None")
    return fixed


def _operations(graph: torch.fx.Graph) -> int:
    return sum(node.target is not must_be_default for node in graph.nodes)


def _attempt(module: nn.Module, defaults: Container[str]) -> torch.fx.Graph | Exception:
    try:
        return _trace_once(module, defaults)
    except Exception as error:  # noqa: BLE001  # the user's own forward: anything can come
        return error


def _trace_once(module: nn.Module, defaults: Container[str]) -> torch.fx.Graph:
    before = {name: (id(b), version_of(b)) for name, b in module.named_buffers()}
    kept = copy.deepcopy(dict(module.named_buffers()))
    try:
        graph = Tracer(defaults).trace(module)
    finally:
        changed = [
            name
            for name, buffer in module.named_buffers()
            if before.get(name) != (id(buffer), version_of(buffer))
        ]
        for name in changed:
            owner, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(owner), attribute, kept[name])
    if changed:
        raise ConversionError(f"its forward changes the buffers {changed}")
    return graph


def _keep_attributes_(gm: torch.fx.GraphModule, module: nn.Module) -> None:
    """What a Python parent may read of its child, and hooks on the child as a whole."""
    for name, value in vars(module).items():
        if not name.startswith("_") and name not in vars(gm):
            vars(gm)[name] = value
    kinds = FORWARD_HOOKS + HOOKS_WITH_KWARGS
    for mine, theirs in zip(hooks_of(gm, kinds), hooks_of(module, kinds), strict=True):
        mine.update(theirs)


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


# axes of what a layer takes and gives, the batch among them
_RANKS = {nn.Conv1d: 3, nn.Conv2d: 4, nn.Conv3d: 5, nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}
_COMPARISONS = (operator.eq, operator.ne)


def _settle_ranks_(graph: torch.fx.Graph, module: nn.Module) -> None:
    """``assert conv(x).ndim == 4`` goes: it is true, and but for it a norm alone reads conv(x)."""
    known: dict[torch.fx.Node, int | bool] = {}
    for node in graph.nodes:
        node.args = torch.fx.node.map_arg(node.args, lambda n: known.get(n, n))
        node.kwargs = torch.fx.node.map_arg(node.kwargs, lambda n: known.get(n, n))
        rank = _rank_asked(node, module)
        if rank is not None:
            known[node] = rank
        elif node.target in _COMPARISONS and all(isinstance(a, int) for a in node.args):
            known[node] = node.target(*node.args)
        elif node.target is ASSERTION and node.args[0] is True:
            known[node] = True
    for node in reversed(known):
        graph.erase_node(node)


def _rank_asked(node: torch.fx.Node, module: nn.Module) -> int | None:
    """The number of axes that `node` asks a layer's output for, if that is what it does."""
    attribute = node.target is getattr and node.args[1] == "ndim"
    if not (attribute or (node.op == "call_method" and node.target in ("dim", "ndimension"))):
        return None
    x = node.args[0]
    if not isinstance(x, torch.fx.Node) or x.op != "call_module":
        return None
    return _RANKS.get(type(module.get_submodule(str(x.target))))


def _drop_unread_items_(graph: torch.fx.Graph) -> None:
    """``y, weights = attention(x)`` where nobody reads `weights`: one reader less.

    Attributes, such as shapes in the message of an assertion, are items as well.
    """
    for node in reversed(list(graph.nodes)):
        if node.target in (operator.getitem, getattr) and not node.users:
            graph.erase_node(node)


_VIEWS = frozenset(
    "getitem chunk split tensor_split unbind view view_as reshape flatten unflatten permute "
    "transpose t movedim moveaxis swapaxes swapdims narrow select squeeze unsqueeze expand "
    "diagonal detach real unsafe_chunk".split()
)


def _name_what_was_overwritten_(graph: torch.fx.Graph, module: nn.Module) -> None:
    """``x.relu_(); f(x)`` becomes ``y = x.relu_(); f(y)``: so the flow of data shows the change.

    Raises:
        ConversionError: A part of a value is changed, and all of it read later.
    """
    position = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        x = node.args[0] if node.args else None
        if not (isinstance(x, torch.fx.Node) and _overwrites(module, node)):
            continue
        later = [user for user in x.users if position[user] > position[node]]
        for user in later:
            user.replace_input_with(x, node)
        while x.op.startswith("call") and _operation(x) in _VIEWS and x.args:
            x = x.args[0]
            if not isinstance(x, torch.fx.Node):
                break
            if any(position[user] > position[node] for user in x.users):
                raise ConversionError(f"it changes a part of {x.name}, which it reads afterwards")


def _operation(node: torch.fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _overwrites(module: nn.Module, node: torch.fx.Node) -> bool:
    """Whether `node` writes its result where its first argument was."""
    if node.op == "call_module":
        return bool(getattr(module.get_submodule(str(node.target)), "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    return is_in_place(node) or bool(node.kwargs.get("inplace")) or "out" in node.kwargs


# not setitem: no graph holds it, as proxies do not support item assignment
IN_PLACE_OPERATORS = ("iadd", "isub", "imul", "itruediv", "ipow")


def is_in_place(node: torch.fx.Node) -> bool:
    """Whether an operation says so by its name: ``x.add_(y)``, ``x += y``."""
    name = _operation(node)
    return (name.endswith("_") and not name.endswith("__")) or name in IN_PLACE_OPERATORS


def _check(model: nn.Module) -> None:
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise ConversionError(
            f"{type(model).__name__} has layers that were never called, so they have no weights: "
            f"{lazy[:4]}. Run the network once on a batch, then convert it."
        )
    quantized = sorted(set(_quantized(model)))
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
            original = original_of(child)
            if original is not None:  # torch.compile: compile the converted network
                setattr(module, name, original)
        if parametrize.is_parametrized(module):
            kind = type(module)  # the caller's, too, and removing edits it
            own = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
            module.__class__ = type(kind.__name__, kind.__bases__, own)
            setattr(module, DERIVED, True)
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        _, hooks = hooks_of(module, FORWARD_HOOKS)
        for key, hook in list(hooks.items()):  # before parametrisations
            if isinstance(hook, (WeightNorm, SpectralNorm)):
                setattr(module, DERIVED, True)
                hook.remove(module)
                del hooks[key]
        base = _same_layer(type(module))
        if base is not None:
            module.__class__ = base
    model = original_of(model) or model
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
