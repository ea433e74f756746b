"""A file of ONNX without what no runtime reads: of a training step that is 4 % of its bytes."""

from __future__ import annotations

import functools
import importlib
import itertools
import string
from collections.abc import Callable, Mapping
from typing import Any

from lightning_da3.exporting.onnx_passes.graph import OPSET, graphs_in

NAMED = 1024  # bytes; constants of fewer bytes have no name that says anything
_DIGITS = string.digits + string.ascii_letters


def compact_(model: Any) -> None:
    """Short names for what lies between, no shapes that follow from others, no defaults.

    What goes in, what comes out and the weights keep their names.

    Args:
        model: A `ModelProto`, edited in place.
    """
    graphs, defaults = list(graphs_in(model.graph)), _defaults()
    named = {v.name for graph in graphs for v in (*graph.input, *graph.output)}
    named |= {t.name for graph in graphs for t in graph.initializer if len(t.raw_data) >= NAMED}
    numbers = (n for n in map(_number, itertools.count()) if n not in named)
    short: dict[str, str] = {}

    def name(old: str) -> str:
        if not old or old in named:  # an input that is left out has none
            return old
        if old not in short:
            short[old] = next(numbers)
        return short[old]

    for graph in graphs:
        _forget_shapes_(graph)
        for tensor in graph.initializer:
            tensor.name = name(tensor.name)
        for value in graph.value_info:
            value.name = name(value.name)
        for node in graph.node:
            node.name = ""
            for i in reversed(range(len(node.attribute))):
                if node.attribute[i] == defaults(node.op_type).get(node.attribute[i].name):
                    del node.attribute[i]
            node.input[:] = map(name, node.input)
            node.output[:] = map(name, node.output)


def _forget_shapes_(graph: Any) -> None:
    """Keep the shapes of those values alone that runtimes cannot find out."""
    known = {t.name for t in graph.initializer}
    known |= {v for node in graph.node if node.op_type == "Constant" for v in node.output}
    open_ = {
        v
        for node in graph.node
        if node.op_type in ("Expand", "Reshape") and node.input[1] not in known
        for v in node.output
    }
    kept = [v for v in graph.value_info if v.name in open_]
    del graph.value_info[:]
    graph.value_info.extend(kept)


def _defaults() -> Callable[[str], Mapping[str, Any]]:
    """From an operation to what its attributes are where it says nothing."""
    onnx: Any = importlib.import_module("onnx")

    @functools.cache
    def of(kind: str) -> Mapping[str, Any]:
        schema = onnx.defs.get_schema(kind, OPSET, "")
        return {name: a.default_value for name, a in schema.attributes.items()}

    return of


def _number(i: int) -> str:
    """A natural number in as few signs as there are."""
    more, last = divmod(i, len(_DIGITS))
    return (_number(more) if more else "") + _DIGITS[last]
