"""A module to one graph of `torch.fx`."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Container
from typing import Any

from torch import fx, nn

from lightning_da3.errors import ConversionError, InputError
from lightning_da3.layers import is_registered, register
from lightning_da3.torch_private.autograd import version_of
from lightning_da3.tracing.lengths import measured_by


class Tracer(fx.Tracer):
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

    def _noted(self, function: Callable[..., Any], args: tuple[Any, ...]) -> fx.Proxy:
        """A call of what only copies know how to trace if they are told (`torch.fx.wrap`)."""
        proxy = super().create_proxy("call_function", function, args, {})
        proxy.node.meta["is_wrapped"] = True
        return proxy

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """The graph of `root`, which may take the `len` of a tensor."""

        def length(value: Any) -> Any:
            return self._noted(len, (value,)) if isinstance(value, fx.Proxy) else len(value)

        inside = list(root.modules()) if isinstance(root, nn.Module) else []
        looked_into = [m for m in inside if m is root or not self.is_leaf_module(m, "")]
        with measured_by(length, looked_into):
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


register(must_be_default, keeps="nothing", pure=True)


def traced_graph(module: nn.Module, *, whole: bool) -> fx.Graph:
    """The graph of `module`, if need be with its optional arguments as they are by default.

    Args:
        module: A copy that nobody else uses.
        whole: It is the whole network. A Python parent may pass other arguments than the default.

    Raises:
        Exception: It cannot be traced. The user's forward is run, so this may be anything.
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


def _operations(graph: fx.Graph) -> int:
    return sum(node.target is not must_be_default for node in graph.nodes)


def _attempt(module: nn.Module, defaults: Container[str]) -> fx.Graph | Exception:
    try:
        return _trace_once(module, defaults)
    except Exception as error:  # noqa: BLE001  # the user's own forward: anything can come
        return error


def _trace_once(module: nn.Module, defaults: Container[str]) -> fx.Graph:
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
            module.get_submodule(owner)._buffers[attribute] = kept[name]
    if changed:
        raise ConversionError(f"its forward changes the buffers {changed}")
    return graph
