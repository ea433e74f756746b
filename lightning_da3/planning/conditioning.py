"""Where a small error of a value makes a large one of a gradient."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from operator import attrgetter

from torch import Tensor, fx, nn

from lightning_da3.layers import ADAPTIVE_POOLS, Facts, facts_of, facts_of_call, operation
from lightning_da3.planning.layers import layer_called
from lightning_da3.tracing.graphs import module_of

# of many elements one: what is wrong with each cancels
_MANY = tuple("mean sum norm var std logsumexp matmul bmm einsum vector_norm".split())
_PRODUCTS = ("matmul", "bmm", "einsum")  # which are coded themselves, and may be next to zero
_POOLS = (*ADAPTIVE_POOLS, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_POWERS = ("pow", "ipow", "float_power")


def is_of_many(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether each element of a node's value is a mean, a sum or the like."""
    return isinstance(layer_called(gm, node), _POOLS) or operation(node) in _MANY


class Conditioning:
    """Finds the nodes of a graph that are not to be differentiated at rounded values.

    Those that decide, as a maximum; those of a steep derivative, as a logarithm; and what leads to
    these element by element, as the square in ``rsqrt(x * x)``.

    Args:
        gm: The graph.
        trained: The nodes that a gradient flows to.
    """

    def __init__(self, gm: fx.GraphModule, trained: Container[fx.Node]) -> None:
        self.gm, self.trained = gm, trained

    def ill(self, nodes: Iterable[fx.Node]) -> set[fx.Node]:
        """Those of the nodes."""
        found: set[fx.Node] = set()
        for node in nodes:
            if node not in self.trained:
                continue  # such as arithmetic of sizes
            facts = self._facts(node)
            if facts.sensitive:
                found.add(node)
            elif facts.steep and (waiting := list(self._steep_in(node))):
                found.add(node)
                while waiting:
                    before = waiting.pop()
                    if before not in found and self._is_small(before):
                        found.add(before)
                        waiting += self._sources(before)
        return found

    def _facts(self, node: fx.Node) -> Facts:
        layer = module_of(self.gm, node)
        return facts_of_call(node) if layer is None else facts_of(layer)

    def _steep_in(self, node: fx.Node) -> Iterator[fx.Node]:
        """The operands by which the derivative has no bound."""
        operands = node.args[:2]
        if operation(node).strip("_") in _POWERS:
            if len(operands) < 2 or self._is_tame(operands[1]):
                return
        elif self._facts(node).does == "quotient":
            operands = operands[1:]
        for operand in operands:
            if not isinstance(operand, fx.Node) or operand not in self.trained:
                continue
            if not self._is_of_many(operand):
                yield operand

    def _is_tame(self, exponent: object) -> bool:
        """Whether the derivative of a power with this exponent is bounded at zero."""
        if isinstance(exponent, fx.Node) and exponent.op == "get_attr":
            value = attrgetter(str(exponent.target))(self.gm)
            return isinstance(value, Tensor) and bool((value >= 1).all())
        return isinstance(exponent, (int, float)) and (exponent >= 1 or exponent == 0)

    def _is_of_many(self, node: fx.Node) -> bool:
        """Whether each element is computed from many, and element by element from there on."""
        waiting, seen = [node], {node}
        while waiting:
            node = waiting.pop()
            if is_of_many(self.gm, node) and operation(node) not in _PRODUCTS:
                continue
            sources = self._sources(node)
            if not sources or not self._is_small(node):
                return False
            waiting += [i for i in sources if i not in seen]
            seen.update(sources)
        return True

    def _is_small(self, node: fx.Node) -> bool:
        """Whether an element depends on few elements of the operands."""
        facts = self._facts(node)
        few = facts.elementwise or facts.steep or facts.sensitive or facts.view
        return few or operation(node) == "repeat"

    def _sources(self, node: fx.Node) -> list[fx.Node]:
        return [i for i in node.all_input_nodes if i in self.trained]
