"""What the axes of tokens are: which has the samples, and how many tokens are no positions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from torch import fx

from lightning_da3.layers import facts_of_call
from lightning_da3.planning.flow import Flow
from lightning_da3.planning.shapes import Shapes, find_shapes
from lightning_da3.tracing.graphs import Part


class Tokens:
    """Tells what the axes of one graph's values are.

    Args:
        part: The traced graph.
        flow: The flow of data in it.
        shapes: Shapes of one sample's values, as far as they are known.
        examples: What the graph is called with, if that is known.
    """

    def __init__(
        self, part: Part, flow: Flow, shapes: Shapes, examples: Sequence[Any] | None
    ) -> None:
        self.gm, self.flow, self.shapes = part.gm, flow, shapes
        self.turned, self.examples = part.turned, examples

    @cached_property
    def _of_two(self) -> Shapes:
        """The shapes of two samples' values."""
        return find_shapes(self.gm, self.examples, samples=2)

    def samples(self, x: fx.Node) -> int | None:
        """The axis of (N, .., C) that has the samples: 0, or 1 of (T, N, C); None: nobody knows.

        Windows (N * windows, T, C) are samples of their own.
        """
        one = self.shapes.get(x, ())
        if self.turned:  # of (T, N, C), the first of T was taken for a sample
            return 1 if len(one) == 3 and one[0] == 1 else None
        if len(one) != 3 or one[0] == 1 or one[1] != 1:
            return 0
        two = self._of_two.get(x)
        if two == (one[0], 2, one[2]):
            return 1
        return 0 if two == (2 * one[0], 1, one[2]) else None

    def in_front(self, x: fx.Node) -> int:
        """Class and register tokens: constants put in front of the others by a concatenation."""
        node: fx.Node | None = x
        while node is not None:
            if facts_of_call(node).does == "concatenation":
                return self._constants_in_front(node)
            node = self.flow.before[node]
        return 0

    def _constants_in_front(self, cat: fx.Node) -> int:
        operands = cat.args[0]
        count = 0
        for operand in operands if isinstance(operands, (list, tuple)) else ():
            if not isinstance(operand, fx.Node) or operand in self.flow.activations:
                break
            shape = self.shapes.get(operand) or self._parameter_shape(operand)
            if shape is None or len(shape) != 3:
                return 0
            count += shape[1]
        return count

    def _parameter_shape(self, node: fx.Node) -> tuple[int, ...] | None:
        while node.op != "get_attr":
            inputs = [i for i in node.all_input_nodes if i.op in ("get_attr", "call_method")]
            if not inputs:
                return None
            node = inputs[0]
        value: Any = self.gm
        for name in str(node.target).split("."):
            value = getattr(value, name)
        return tuple(value.shape)
