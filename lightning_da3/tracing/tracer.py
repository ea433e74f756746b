"""A module to one graph of `torch.fx`, without lies.

`torch.fx` runs a forward once, and believes what it sees. What it cannot see is recognised here
while it happens, and then the smallest function or module that does it becomes one node, which
runs as Python each time.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import CodeType
from typing import Any

from torch import Tensor, fx, nn

from lightning_da3.layers import WRITES, as_pytorch, is_registered
from lightning_da3.tracing import frames
from lightning_da3.tracing.aliases import Aliases
from lightning_da3.tracing.autocast import ASKED, Autocast, kind_asked
from lightning_da3.tracing.first_calls import Left
from lightning_da3.tracing.functions import PythonFunctions
from lightning_da3.tracing.guards import asks_device, may_check, must_be, must_be_default
from lightning_da3.tracing.hooks import Hooks, calling, has_others, next_number, why_not
from lightning_da3.tracing.interception import FACTORIES, intercepted
from lightning_da3.tracing.probes import PROBED, VARIES, Probes, SizeDecides, is_written, versions
from lightning_da3.tracing.refusals import CannotTrace, first_line
from lightning_da3.tracing.signatures import call_of
from lightning_da3.tracing.values import Value, built_from, holds, structured
from lightning_da3.tracing.watched import Watched
from lightning_da3.tracing.watching import Draws, Modes, Snapshot, plain_modes, random_states


class Tracer(Watched):
    """`torch.fx.Tracer` that keeps our own modules whole, and what it cannot see.

    `torch.fx.symbolic_trace` would look through them and lose every custom backward silently.

    Args:
        defaults: Arguments of the traced forward that are always this: it may branch on them.
        probes: Inputs of the module, without values; None: what a value is stays unknown.
        leaves: Why a function is one node, by its code.
        python: Why a module stays Python, by its path.
        whole: The module is the whole network: what is written into its inputs, nobody else reads.
        may_set_up: See `Watched`.
        after: The trace of its first call, whose traces this one finds; None: this is the first.

    Attributes:
        opaque: Modules that are one node and no layers, by their paths.
        left: What was set up.
    """

    def __init__(
        self,
        defaults: Mapping[str, Any] | None = None,
        probes: Probes | None = None,
        leaves: dict[CodeType, str] | None = None,
        python: dict[str, str] | None = None,
        *,
        whole: bool = True,
        may_set_up: bool = False,
        after: Tracer | None = None,
    ) -> None:
        super().__init__(leaves, may_set_up=may_set_up)
        self.defaults, self.probes, self.whole, self.after = defaults or {}, probes, whole, after
        self.left = Left()
        self.python = {} if python is None else python
        self.opaque: dict[str, nn.Module] = {}
        self.aliases = Aliases(whole=whole)
        self._modes: Modes | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """PyTorch's layers, ours and registered ones are nodes; everything else is looked into."""
        ours = type(m).__module__.startswith("lightning_da3.") or is_registered(type(m))
        return ours or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> Value:
        """What stands for the value of a node."""
        value = Value(node, self)
        self._made.append(weakref.ref(value))
        return value

    def create_arg(self, a: Any) -> Any:
        """A value is its node, whatever it says that it is."""
        if isinstance(a, Value):
            return a.node
        made = built_from(a)  # torch.fx would give a plain dictionary
        if made is not None:
            return self.create_proxy("call_function", type(a), *made).node
        return super().create_arg(a)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Refuse what happens where a graph would not know of it."""
        if self._modes is not None:
            changed = self._modes.changed()
            if changed:
                self.cannot(f"it changes {changed}")
            for frame in self._frames():
                if frame.f_code in self._forwards:
                    name = self._forwards[frame.f_code]
                    self.cannot(f"it applies {name}, whose backward is its own")
        node = super().create_node(*args, **kwargs)
        if node.op == "get_attr":  # created for arguments, too
            if self.probes is not None:
                self.probes.run(node, self.root)
            self.aliases.add(node, self.root)
        return node

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: Any, *others: Any, **named: Any
    ) -> Any:
        """An argument that is what it is by default stays in the signature, and is checked."""
        proxy = super().create_proxy(kind, target, args, kwargs, *others, **named)
        if kind != "get_attr":
            self._examine(proxy.node)
        if kind != "placeholder" or target not in self.defaults or target.startswith("*"):
            return proxy
        self.noted(must_be_default, (proxy, target, self.defaults[target]))
        return self.defaults[target]

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """The forward's placeholders, and what is called with them."""
        own = inspect.unwrap(root_fn)
        function, args = super().create_args_for_root(own, is_module, concrete_args)
        rest = self.defaults and inspect.getfullargspec(own).varkw
        if rest and f"**{rest}" in self.defaults:
            self.noted(must_be_default, (args[-1], rest, self.defaults[f"**{rest}"]))
        elif own is root_fn:
            return function, args
        return call_of(root_fn, args, self.defaults), args

    def _examine(self, node: fx.Node) -> None:
        """See what a new node gives, and whether it reads what was written to."""
        before = {i: versions(i.meta.get(PROBED, ())) for i in node.all_input_nodes}
        if self.probes is not None:
            since = next_number()
            self.probes.run(node, self.root)
            if node.op == "call_module":  # what its Python leaves behind are no values
                self._snapshot.restore(self.root.get_submodule(str(node.target)), since)
        changed = [i for i, was in before.items() if versions(i.meta.get(PROBED, ())) != was]
        if changed and is_written(node):
            node.meta[WRITES] = True
        problem = self.aliases.add(node, self.root, changed)
        if problem:
            self.cannot(problem)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """A parameter is a node; not while values are looked at, nor one that is gone."""
        if self._probing or not self.is_here():
            return attr_val
        if self.erased:
            for name, proxy in list(parameter_proxy_cache.items()):
                if proxy.node in self.erased:
                    del parameter_proxy_cache[name]
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_here(
        self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """A layer is a node, and so is what a graph cannot hold; others are looked into."""
        if self._probing:
            return m.forward(*args, **kwargs)
        path, hung = self.path_of_module(m), self._hooks.hung(m)
        layer = self.is_leaf_module(m, path)
        if layer or path in self.python or has_others(m, hung):
            return self._one_node(m, forward, args, kwargs, layer=layer)
        nodes, stack = len(self.graph.nodes), self.module_stack.copy()
        aliases, since, running = self.aliases.copy(), next_number(), self.running
        off = self._autocast.off.copy()
        try:
            return super().call_here(
                m, lambda *a, **k: self.look_into(m, forward, a, k), args, kwargs
            )
        except Exception as error:  # noqa: BLE001  # the user's own forward: anything can come
            self._refused = None
            self._refine(error)
            self.python[path] = f"{type(m).__name__}: {first_line(error)}"
        for node in reversed(list(self.graph.nodes)[nodes:]):
            self.graph.erase_node(node)
            self.erased.add(node)
        self.module_stack, self.aliases, self._autocast.off = stack, aliases, off
        self._snapshot.restore(since=since, but=[self.root, *running])
        return self._one_node(m, forward, args, kwargs)

    def _one_node(
        self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any, layer: bool = False
    ) -> Any:
        """A call of a module as a node. Hooks that the traced code hung on it run around that."""
        path, hung = self.path_of_module(m), self._hooks.hung(m)
        if any(self._hooks.hung(inner) for inner in m.modules() if inner is not m):
            self.cannot(f"it hooks into what {path} holds, which is one node")

        def node(*args: Any, **kwargs: Any) -> Any:
            if layer:
                return super(Tracer, self).call_here(m, forward, args, kwargs)
            self.opaque[path] = m
            return structured(self.create_proxy("call_module", path, args, kwargs))

        if not hung:
            return node(*args, **kwargs)
        if problem := why_not(m, hung):
            self.cannot(problem)
        with calling(m, hung, node):
            return forward(*args, **kwargs)

    def to_bool(self, obj: Any) -> bool:
        """Whether a value is true, if that is known."""
        return bool(self.decided(obj))

    def iter(self, obj: Any) -> Any:
        """The items of a value, if it is known how many there are."""
        return iter([obj[i] for i in range(self.length(obj))])

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """The graph of `root`.

        Raises:
            NewLeaf: A function is to be one node.
            ProbeFailed: The module does not take a probe.
            Exception: It cannot be traced. The user's forward is run, so this may be anything.
        """
        inside = list(root.modules()) if isinstance(root, nn.Module) else []
        looked_into = [m for m in inside if m is root or not self.is_leaf_module(m, "")]
        with ExitStack() as stack:
            if self.after is not None:
                stack.enter_context(self.after.left.applied())
            self._autocast = Autocast()
            stack.enter_context(plain_modes(self._autocast))
            stack.enter_context(intercepted(self._as_node, self.leaves, looked_into))
            self.functions = PythonFunctions(root, self.leaves)
            self._snapshot = Snapshot(root)
            self._hooks: Hooks = (self.after or self)._snapshot.hooks
            stack.callback(self._snapshot.restore)
            stack.enter_context(Draws(self._drawn, lambda: self._probing, self._autocast))
            self._modes = Modes(self._autocast)
            before = random_states()
            try:
                graph = super().trace(root, concrete_args)
                self._check_done(root, before)
                for module in inside:
                    self._check_unchanged(module)
            except Exception as error:
                self._refine(error)
                raise
            finally:
                self._modes = None
            self._check_gone()
            self._autocast.check_(graph)
            self.left = self._snapshot.left()
            if self.left and not self.may_set_up:
                raise CannotTrace("its forward leaves hooks behind")
        return graph

    # --- decisions --------------------------------------------------------------------------------

    def decided(self, value: Value) -> Any:
        """What a value is, now and later: it is checked in every call.

        Raises:
            CannotTrace: That is not known, or depends on how many samples there are, how large they
                are, or on precision and device.
        """
        node = value.node
        if PROBED not in node.meta:
            self.cannot("it decides on a value that is not known")
        first, *others = node.meta[PROBED]
        if isinstance(first, Tensor):
            self.cannot("it decides on the values of a tensor")
        if node.meta[VARIES]:
            leaf = frames.leafable(self._frames(), self.leaves, self._forwards)
            here = next(reversed(self.running), None if self.whole else self.root)
            alike = self.probes is not None and self.probes.alike
            may = leaf is None or asks_device(node)
            may = may and may_check(node, node.meta[VARIES], here, alike)
            differs = any(other != first for other in others)
            if may and differs and self.whole and not alike:
                raise SizeDecides
            if differs or not may:
                self.cannot(f"it decides on the {node.meta[VARIES]} of its input")
        if not isinstance(first, (int, float, str, type(None))) and not node.meta[VARIES]:
            return first  # a dtype, say, that does not vary
        self.noted(must_be, (value, first, frames.place(self._frames())))
        return first

    def length(self, value: Value) -> int:
        """How many items a value has, now and later."""
        return int(self.decided(self.noted(len, (value,))))

    def noted(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """A call of what only copies know how to trace if they are told (`torch.fx.wrap`)."""
        proxy = self.create_proxy("call_function", function, args, {})
        proxy.node.meta["is_wrapped"] = True
        return proxy

    # --- nodes of their own -----------------------------------------------------------------------

    def _as_node(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """What is called for a function that is a node."""
        if function is len:
            return lambda x: self.noted(len, (x,)) if isinstance(x, fx.Proxy) else len(x)
        name = getattr(function, "__name__", "")
        if name in ASKED:
            return lambda *args, **kwargs: self._asked(function, args, kwargs)
        factory = name in FACTORIES
        known = function if factory else as_pytorch(function)

        def call(*args: Any, **kwargs: Any) -> Any:
            if self._probing or (factory and not holds(args, kwargs, Value)):
                return function(*args, **kwargs)
            if known is not None:
                return self.create_proxy("call_function", known, args, kwargs)
            proxy = self.create_proxy("call_module", self.functions.name_of(function), args, kwargs)
            return structured(proxy)

        return call

    def _asked(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What autocast is, where it is off; that is checked in every call."""
        kind = kind_asked(function, args, kwargs)
        kind = self.decided(kind) if isinstance(kind, Value) else kind
        if not (self._probing or self._autocast.is_off(kind)):
            self.cannot("it asks for autocast, which is on")
        return function(kind) if args or kwargs else function()

    def _drawn(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Random numbers that no traced value is asked for are drawn in every call."""
        if holds(args, kwargs, Tensor):
            self.cannot(f"it draws random numbers ({getattr(function, '__name__', function)})")
        return self.create_proxy("call_function", function, args, kwargs)

    @property
    def _probing(self) -> bool:
        return self.probes is not None and self.probes.at_work
