"""What the graphs of a traced model are, and what their nodes call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn


@dataclass(frozen=True)
class Part:
    """One graph of a traced model.

    Attributes:
        path: The dotted name of the module that became a graph, in the user's model. "" is the
            whole model.
        gm: The graph, with the same weights, call signature and outputs.
        single: It is the graph of one layer.
        inputs: What it is called with, without values, if that is known and it is a part.
        turned: It is called with (T, N, C), whose second axis has the samples.
    """

    path: str
    gm: fx.GraphModule
    single: bool = False
    inputs: Sequence[Any] | None = None
    turned: bool = False

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
        functions: Why a function is one node, by the path of the module that calls it.
        network: The name of the model's class.
        inputs: The model's arguments, without values, as far as they are known or were guessed.
    """

    root: nn.Module
    parts: tuple[Part, ...]
    python: dict[str, str] = field(default_factory=dict)
    functions: dict[str, str] = field(default_factory=dict)
    network: str = ""
    inputs: Sequence[Any] = ()


def module_of(gm: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The module that `node` calls, or None for any other kind of node."""
    return module_in(gm, node)


def module_in(root: nn.Module, node: fx.Node) -> nn.Module | None:
    """The module of `root` that `node` calls, or None for any other kind of node."""
    if node.op != "call_module":
        return None
    return root.get_submodule(str(node.target))


def output_node(graph: fx.Graph) -> Any:
    """The one output node."""
    return next(node for node in reversed(graph.nodes) if node.op == "output")
