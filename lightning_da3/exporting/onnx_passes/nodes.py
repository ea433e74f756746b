"""Nodes in the place of others in a graph of ONNX."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np


class Nodes:
    """Nodes that are made, in order.

    Args:
        model: An ir model.
        name: What names of values begin with.
    """

    def __init__(self, model: Any, name: str) -> None:
        self.model, self.name = model, name
        self.made: list[Any] = []
        self.held = 0
        self.ir: Any = importlib.import_module("onnx_ir")

    def call(self, op: str, *inputs: Any, **attributes: Any) -> Any:
        """The result of an operation."""
        self.made.append(self.ir.node(op, inputs, attributes))
        (value,) = self.made[-1].outputs
        value.name = f"{self.name}.{len(self.made)}"
        return value

    def constant(self, numbers: list[int] | np.ndarray, name: str | None = None) -> Any:
        """A constant; integers are of 64 bits. One with a name is made once."""
        if name is not None and name in self.model.graph.initializers:
            return self.model.graph.initializers[name]
        if name is None:
            self.held += 1
            name = f"{self.name}.by_{self.held}"
        value = self.ir.Value(name=name, const_value=self.ir.tensor(numbers, name=name))
        self.model.graph.register_initializer(value)
        return value

    def replace(self, node: Any, value: Any) -> None:
        """What was made, in the place of a node of one result."""
        (before,) = node.outputs
        value.shape, value.dtype, value.type = before.shape, before.dtype, before.type
        self.model.graph.insert_before(node, self.made)
        before.replace_all_uses_with(value, replace_graph_outputs=True)
        value.name = before.name
        self.model.graph.remove(node, safe=True)
