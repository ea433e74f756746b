"""Graphs in one form, whatever way the user wrote the same: what is behind looks in one place."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx, nn

from lightning_da3.errors import ConversionError
from lightning_da3.layers import facts_of, facts_of_call
from lightning_da3.torch_private.modules import ASSERTION
from lightning_da3.tracing.aliases import written
from lightning_da3.tracing.guards import must_be
from lightning_da3.tracing.items import puts_back
from lightning_da3.tracing.layer_calls import call_layers_
from lightning_da3.tracing.values import IN_PLACE


def normalize_(graph: fx.Graph, root: nn.Module) -> None:
    """Edit a traced graph; it computes the same.

    Args:
        graph: The graph of `root`.
        root: A copy that nobody else uses.

    Raises:
        ConversionError: A part of a value is changed, and all of it read later.
    """
    call_layers_(graph, root)
    _first_by_position_(graph)
    _settle_ranks_(graph, root)
    _drop_unread_items_(graph)
    _name_what_was_overwritten_(graph, root)
    _write_nowhere_(graph)


def _first_by_position_(graph: fx.Graph) -> None:
    """``layer(input=x)`` becomes ``layer(x)``, so that everything behind finds x in one place."""
    for node in graph.nodes:
        if node.op in ("call_module", "call_function") and not node.args and "input" in node.kwargs:
            node.args = (node.kwargs["input"],)
            node.kwargs = {name: arg for name, arg in node.kwargs.items() if name != "input"}


_COMPARISONS = (operator.eq, operator.ne)


def _settle_ranks_(graph: fx.Graph, module: nn.Module) -> None:
    """``assert conv(x).ndim == 4`` goes: it is true, and but for it a norm alone reads conv(x)."""
    known: dict[fx.Node, int | bool] = {}
    for node in graph.nodes:
        node.args = fx.map_arg(node.args, lambda n: known.get(n, n))
        node.kwargs = fx.map_arg(node.kwargs, lambda n: known.get(n, n))
        rank = _rank_asked(node, module)
        if rank is not None:
            known[node] = rank
        elif node.target in _COMPARISONS and all(isinstance(a, int) for a in node.args):
            known[node] = node.target(*node.args)
        elif (node.target is ASSERTION and node.args[0] is True) or (
            node.target is must_be and node.args[0] == node.args[1]
        ):
            known[node] = True
    for node in reversed(known):
        graph.erase_node(node)


def _rank_asked(node: fx.Node, module: nn.Module) -> int | None:
    """The number of axes that `node` asks a layer's output for, if that is what it does."""
    attribute = node.target is getattr and node.args[1] == "ndim"
    length = node.target is len  # of the shape
    asked = attribute or length or node.target in ("dim", "ndimension")
    x = node.args[0] if asked and node.args else None
    if length:
        shape = isinstance(x, fx.Node) and x.target is getattr and x.args[1] == "shape"
        x = x.args[0] if shape and isinstance(x, fx.Node) else None
    if not isinstance(x, fx.Node) or x.op != "call_module":
        return None
    return facts_of(module.get_submodule(str(x.target))).rank or None


def _drop_unread_items_(graph: fx.Graph) -> None:
    """``y, weights = attention(x)`` where nobody reads `weights`: one reader less.

    Attributes, such as shapes in the message of an assertion, are items as well.
    """
    for node in reversed(list(graph.nodes)):
        if node.target in (operator.getitem, getattr) and not node.users:
            graph.erase_node(node)


def _name_what_was_overwritten_(graph: fx.Graph, module: nn.Module) -> None:
    """``x.relu_(); f(x)`` becomes ``y = x.relu_(); f(y)``: so the flow of data shows the change.

    Raises:
        ConversionError: A part of a value is changed, and all of it read later.
    """
    position = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        x: Any = written(node, module)
        if x is None:
            continue
        later = [user for user in x.users if position[user] > position[node]]
        for user in later:
            user.replace_input_with(x, node)
        while facts_of_call(x).view and x.args:
            x = x.args[0]
            if not isinstance(x, fx.Node):
                break
            later = sorted(
                (u for u in x.users if position[u] > position[node]), key=lambda u: position[u]
            )
            if later and puts_back(later[0], node):
                break  # the others read what that gives
            if later:
                raise ConversionError(f"it changes a part of {x.name}, which it reads afterwards")


def _write_nowhere_(graph: fx.Graph) -> None:
    """``x += y`` becomes ``z = x + y``: whoever reads x afterwards reads z already."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target in IN_PLACE:
            node.target = IN_PLACE[node.target]
