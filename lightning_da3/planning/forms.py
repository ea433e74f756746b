"""Which recompute regions have a hand-written backward, which needs fewer operations."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import fx, nn

from lightning_da3.layers import CONVS, facts_of_call, is_in_place, replacement_for
from lightning_da3.nn.activation import HardSigmoid, PiecewiseLinear, QuantizedGradActivation
from lightning_da3.nn.convolution import pads_zeros_alike
from lightning_da3.nn.pooling import AdaptiveAvgPool
from lightning_da3.planning.layers import layer_called
from lightning_da3.planning.nodes import value_of
from lightning_da3.planning.plan import NodePlan, RecomputeRegion

_SPATIAL = ((2, 3), [2, 3], (-2, -1), [-2, -1])
_SMALL = (QuantizedGradActivation, PiecewiseLinear, HardSigmoid)


class FormFinder:
    """Tells the form of regions of one graph.

    Args:
        gm: The traced graph.
        nodes: What becomes of every node.
        exact: No codes are used.
    """

    def __init__(self, gm: fx.GraphModule, nodes: Sequence[NodePlan], exact: bool) -> None:
        self.gm, self.exact = gm, exact
        self.named = {node.name: node for node in gm.graph.nodes}
        self.plan: Mapping[str, NodePlan] = {node.name: node for node in nodes}

    def form_of(self, region: RecomputeRegion) -> str:
        """The form, as `RecomputeRegion.form` says it."""
        inside = [self.named[name] for name in region.nodes]
        read = [n for n in inside if any(user not in inside for user in n.users)]
        inside = [n for n in inside if self._of(n) is n]
        if region.with_hosts or region.also or len(read) != 1 or len(inside) < 2:
            return "graph"
        x, last = self.named[region.source], self._of(read[0])
        if last is not inside[-1]:
            return "graph"
        if len(inside) == 2:
            return "activated convolution" if self._is_activated_conv(x, inside) else "graph"
        bends = self._is_smooth(inside[0]) and self._is_chain([x, inside[0]])
        v, rest = (inside[0], inside[1:]) if bends else (self._of(x), inside)
        return "excitation" if self._is_excitation(v, rest) else "graph"

    def _of(self, node: fx.Node) -> fx.Node:
        return value_of(node, self.plan)

    def _is_chain(self, nodes: Sequence[fx.Node]) -> bool:
        """Whether each reads the one before first, and nothing else."""
        return all(
            isinstance(b.args[0], fx.Node)
            and self._of(b.args[0]) is self._of(a)
            and len(b.all_input_nodes) == 1
            for a, b in itertools.pairwise(nodes)
        )

    # --- forms ------------------------------------------------------------------------------------

    def _is_activated_conv(self, x: fx.Node, inside: Sequence[fx.Node]) -> bool:
        """``silu(conv(x))``."""
        conv = layer_called(self.gm, inside[0])
        plain = self._freezes(inside[0]) and type(conv) in CONVS and pads_zeros_alike(conv)  # type: ignore[arg-type]
        return plain and self._is_smooth(inside[1]) and self._is_chain([x, *inside])

    def _is_excitation(self, v: fx.Node, inside: Sequence[fx.Node]) -> bool:
        """``v * s(mean(v))`` with pointwise convolutions and activations in s."""
        *branch, product = inside
        if len(branch) < 2 or not self._is_chain([v, *branch]):
            return False
        facts = facts_of_call(product)
        times = facts.does == "product" and facts.elementwise and not is_in_place(product)
        read = [self._of(i) for i in product.args if isinstance(i, fx.Node)]
        if not times or len(product.args) != 2 or {*read} != {self._of(v), branch[-1]}:
            return False
        mean, first, *rest = branch
        if not (self._is_matrix(first) and self._is_mean(mean, first)):
            return False
        return all(self._is_matrix(n) or isinstance(self._built(n), _SMALL) for n in rest)

    def _freezes(self, node: fx.Node) -> bool:
        return self.plan[node.name].action == "freeze" and node.op == "call_module"

    def _built(self, node: fx.Node) -> nn.Module | None:
        """What takes the place of a node's layer."""
        layer = layer_called(self.gm, node)
        found = None if layer is None else replacement_for(layer, self.exact)
        replaced = self.plan[node.name].action == "replace"
        return found.build(False) if replaced and found and found.build else None

    def _is_smooth(self, node: fx.Node) -> bool:
        """Whether it is an activation whose backward reads the input, not the value."""
        built = self._built(node)
        return isinstance(built, QuantizedGradActivation) and not built.smooth.reads_value

    def _is_matrix(self, node: fx.Node) -> bool:
        conv = layer_called(self.gm, node)
        return (
            self._freezes(node)
            and isinstance(conv, CONVS)
            and conv.groups == 1
            and pads_zeros_alike(conv)
            and not any(conv.padding if isinstance(conv.padding, tuple) else ())
            and conv.weight[0, 0].numel() == 1
        )

    def _is_mean(self, node: fx.Node, conv: fx.Node) -> bool:
        """Whether it leaves `conv` one number of every channel, (N, C, 1, ..)."""
        built = self._built(node)
        if built is not None:
            return isinstance(built, AdaptiveAvgPool) and {*built.grid} == {1}
        layer = layer_called(self.gm, conv)
        axes = layer.weight.dim() if isinstance(layer, CONVS) else 0
        if node.target not in ("mean", torch.mean) or axes != 4:
            return False
        arguments = dict(zip(("dim", "keepdim"), node.args[1:], strict=False)) | node.kwargs
        return arguments in [{"dim": dim, "keepdim": True} for dim in _SPATIAL]
