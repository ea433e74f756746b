"""Which node of a graph, or which module of a network, runs."""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Iterator
from typing import Any

from torch import fx, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list

from lightning_da3.memory.saved import SavedActivations
from lightning_da3.torch_private.autograd import current_node, next_node_number, node_number


class Names:
    """Tells which node of a graph, or which module, runs; in the backward, whose gradient.

    Attributes:
        stack: The names of what runs, the innermost last.
        timeline: The number of autograd's next node and the name that creates it, at every change.
    """

    def __init__(self) -> None:
        self.stack = [""]
        self.timeline = [(next_node_number(), "")]
        self._in_graph = 0

    @property
    def now(self) -> str:
        """The name of what runs; empty for what has none."""
        if len(self.stack) > 1:
            return self.stack[-1]
        node: Any = current_node()
        if node is None:
            return ""
        place = bisect.bisect_right(self.timeline, node_number(node), key=lambda item: item[0])
        return self.timeline[place - 1][1]

    @contextlib.contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """What runs in the block has this name."""
        self._push(name)
        try:
            yield
        finally:
            self._pop()

    def _push(self, name: str) -> None:
        self.stack.append(name)
        self.timeline.append((next_node_number(), name))

    def _pop(self) -> None:
        self.stack.pop()
        self.timeline.append((next_node_number(), self.stack[-1]))

    @contextlib.contextmanager
    def of(self, network: nn.Module) -> Iterator[None]:
        """In the block graphs run node by node, and modules outside of graphs have names."""
        with contextlib.ExitStack() as stack:
            for path, module in network.named_modules():
                for owned in (module, *vars(module).values()):  # some are referred to, not owned
                    if isinstance(owned, fx.GraphModule):
                        stack.callback(vars(owned).pop, "forward", None)
                        owned.forward = ByNode(owned, _home(network, path), self).run
                if not isinstance(module, fx.GraphModule):
                    self._hook(module, path, stack)
            yield

    def _hook(self, module: nn.Module, path: str, stack: contextlib.ExitStack) -> None:
        def enter(_module: nn.Module, _args: Any) -> None:
            if not self._in_graph:
                self._push(path)

        def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
            if not self._in_graph:
                self._pop()

        stack.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
        stack.callback(module.register_forward_hook(leave, always_call=True).remove)

    @contextlib.contextmanager
    def node(self, name: str) -> Iterator[None]:
        """What runs in the block has this name, and modules in it have none of their own."""
        self._in_graph += 1
        try:
            with self.inside(name):
                yield
        finally:
            self._in_graph -= 1


def _home(network: nn.Module, path: str) -> str:
    """The path of the outermost graph that holds a module."""
    parts = path.split(".") if path else []
    for count in range(len(parts) + 1):
        outer = ".".join(parts[:count])
        if isinstance(network.get_submodule(outer), fx.GraphModule):
            return outer
    return path


class ByNode(fx.Interpreter):
    """Runs a graph node by node; values are freed as its own code frees them."""

    def __init__(self, gm: fx.GraphModule, path: str, names: Names) -> None:
        super().__init__(gm)
        self.path, self.names = f"{path}." if path else "", names

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph on the arguments of its forward."""
        signature = [n for n in self.module.graph.nodes if n.op == "placeholder"]  # type: ignore[union-attr]
        values = list(args)
        for node in signature[len(args) :]:
            name = str(node.target)
            if name in kwargs:
                values.append(kwargs[name])
            elif node.args:
                values.append(node.args[0])
        try:
            return super().run(*values)
        finally:
            self.env, self.args_iter = {}, iter(())  # they hold the results and the arguments

    def run_node(self, n: fx.Node) -> Any:
        """Run one node under its name."""
        if n.op in ("placeholder", "output", "get_attr"):
            return super().run_node(n)
        with self.names.node(self.path + n.name):
            return super().run_node(n)

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[Any, Any]:
        """The arguments of a node, with new lists, as the graph's own code makes them."""
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return mutable(args), mutable(kwargs)


def mutable(value: Any) -> Any:
    """`value` with plain lists and dictionaries in the place of those of `torch.fx`."""
    if type(value) in (list, immutable_list):
        return [mutable(v) for v in value]
    if type(value) in (dict, immutable_dict):  # others are the user's own
        return {k: mutable(v) for k, v in value.items()}
    return tuple(mutable(v) for v in value) if type(value) is tuple else value


class SavedByName(SavedActivations):
    """Attributes saved bytes to names."""

    def __init__(self, network: nn.Module, inputs: Any, names: Names) -> None:
        super().__init__(network, inputs=inputs)
        self._names = names

    def __enter__(self) -> SavedActivations:
        super().__enter__()
        self._stack, self._timeline = self._names.stack, self._names.timeline
        return self

    def _hook_modules(self, stack: contextlib.ExitStack) -> None:
        """The names come from elsewhere."""
