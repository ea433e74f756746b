"""The user's model to a graph. Reads, never edits."""

from __future__ import annotations

import copy
from typing import Any

import torch.fx
from torch import nn

from lightning_da3.errors import ConversionError
from lightning_da3.registry import is_registered


class Tracer(torch.fx.Tracer):
    """`torch.fx.Tracer` that keeps our own modules whole.

    `torch.fx.symbolic_trace` would look through them and lose every custom backward silently.
    """

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """PyTorch's layers, ours and registered ones are nodes; everything else is looked into."""
        ours = type(m).__module__.startswith("lightning_da3.") or is_registered(type(m))
        return ours or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> torch.fx.GraphModule:
    """A frozen copy of `model` in eval, as a graph.

    Args:
        model: Any module that `torch.fx` can trace; left unchanged.

    Returns:
        A GraphModule with the same weights (copied), call signature and outputs.

    Raises:
        ConversionError: The model cannot be copied, or its forward cannot be traced.
    """
    twin = _copy(model).eval().requires_grad_(False)
    try:
        graph = Tracer().trace(twin)
    except Exception as error:  # tracing runs the user's own forward: anything can come
        raise ConversionError(
            f"{type(model).__name__}.forward cannot be traced by torch.fx: {error} "
            "The usual reasons are Python control flow on tensor values, and calls that need real "
            "shapes. Put that part into a function marked with `torch.fx.wrap`, or convert the "
            "part of the network that can be traced: `model.features = convert(model.features)`."
        ) from error
    _first_by_position_(graph)
    return torch.fx.GraphModule(twin, graph, class_name=type(model).__name__)


def _first_by_position_(graph: torch.fx.Graph) -> None:
    """``layer(input=x)`` becomes ``layer(x)``, so that everything behind finds x in one place."""
    for node in graph.nodes:
        if node.op in ("call_module", "call_function") and not node.args and "input" in node.kwargs:
            node.args = (node.kwargs["input"],)
            node.kwargs = {name: arg for name, arg in node.kwargs.items() if name != "input"}


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:  # the user's own __deepcopy__ or state
        raise ConversionError(
            f"{type(model).__name__} cannot be copied, and conversion never edits the caller's "
            f"model: copy.deepcopy failed with: {error}"
        ) from error


def module_of(gm: torch.fx.GraphModule, node: torch.fx.Node) -> nn.Module | None:
    """The module that `node` calls, or None for any other kind of node."""
    if node.op != "call_module":
        return None
    return gm.get_submodule(str(node.target))


def output_node(graph: torch.fx.Graph) -> Any:
    """The one output node."""
    return next(node for node in reversed(graph.nodes) if node.op == "output")
