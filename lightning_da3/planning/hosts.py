"""Where hosts are: every spatial convolution, and every residual branch of tokens; else any layer.

A depthwise convolution takes its pointwise neighbours along: it mixes no channels itself, and the
narrow ends of such a block are what is cheap to read.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, fx, nn

from lightning_da3.layers import BATCH_NORMS, CONVS, facts_of, facts_of_call
from lightning_da3.planning.flow import Flow, Nodes
from lightning_da3.planning.layers import (
    common_path,
    has_statistics,
    has_weights,
    is_depthwise,
    is_pointwise,
    is_spatial,
    layer_called,
    mixes_channels,
)
from lightning_da3.planning.macs import macs_per_position
from lightning_da3.planning.plan import HostPlan
from lightning_da3.planning.shapes import InputSize, Shapes, reductions
from lightning_da3.planning.tokens import Tokens
from lightning_da3.tracing.graphs import Part, module_of, output_node

POOLED = math.inf  # the reduction of one position that stands for all


class HostFinder:
    """Finds the hosts of one graph.

    Args:
        part: The traced graph.
        flow: The flow of data in it.
        shapes: Shapes of its values, as far as they are known.
        head: Module name of the classifier, which is no host.
        folds: Convolution by batch norm node.
        size: How large the network's input is.
        examples: What the graph is called with, if that is known.
    """

    def __init__(
        self,
        part: Part,
        flow: Flow,
        shapes: Shapes,
        head: str | None,
        folds: dict[str, str],
        size: InputSize,
        examples: Sequence[Any] | None,
    ) -> None:
        self.size, self.tokens = size, Tokens(part, flow, shapes, examples)
        self.part, self.gm, self.flow, self.shapes, self.head = part, part.gm, flow, shapes, head
        self.norm_of = {conv: norm for norm, conv in folds.items()}
        self.reduction = reductions(part.gm)
        self.names: Counter[str] = Counter()

    def candidates(self, *, every: bool = False) -> Iterator[tuple[float, HostPlan]]:
        """(reduction of its input, host), in the order in which data meets them.

        Args:
            every: With those that are only taken where there is nothing else.
        """
        found: list[tuple[int, float, HostPlan]] = []
        covered: set[fx.Node] = set()
        for node in self.flow.activations:
            for x, last in self._branches(node):
                inside = self.flow.between(x, [last])
                host = None if covered & set(inside) else self._branch(x, last, inside, deep=every)
                if host is not None:
                    covered |= set(inside)
                    found.append((self.flow.position[x], self._reduction(x, host), host))
        if not found and self.part.path and not self.part.single:
            found += self._whole_branch()
        lone: list[tuple[int, float, HostPlan]] = []
        for node in self.flow.activations:
            conv = module_of(self.gm, node)
            if node in covered or not is_spatial(conv) or str(node.target) == self.head:
                continue
            first = last = node
            if is_depthwise(conv):
                first = self._neighbour(node, backwards=True) or node
                last = self._neighbour(node, backwards=False) or node
            x = self.flow.inputs(first)[0]
            alone = (is_depthwise(conv) and first is last) or self._embeds_patches(node)
            kind = lone if alone else found
            kind.append((self.flow.position[x], self.reduction[node], self._conv(first, last)))
        # what mixes no channels, or reads raw pixels, has little to adapt: taken if nothing else is
        taken = found + lone if every else found or lone
        for _, reduction, host in sorted(taken, key=lambda item: item[0]):
            yield reduction, host

    def _embeds_patches(self, node: fx.Node) -> bool:
        """Whether it is a convolution of the network's input with windows side by side."""
        conv: Any = module_of(self.gm, node)
        raw = self.flow.inputs(node)[0].op == "placeholder" and not self.part.path
        return raw and max(conv.stride) > 1 and conv.kernel_size == conv.stride

    def any_layers(self) -> Iterator[HostPlan]:
        """The hosts of a network with neither: every layer that mixes channels."""
        for node in self.flow.activations:
            layer = module_of(self.gm, node)
            if str(node.target) == self.head:
                continue
            if is_pointwise(layer):
                yield self._conv(node, node)
            elif isinstance(layer, nn.Linear):
                x = self.flow.inputs(node)[0]
                samples = self.tokens.samples(x)
                if samples is None:
                    continue
                yield HostPlan(
                    name=self._name(str(node.target)),
                    source=x.name,
                    readers=(node.name,),
                    last=node.name,
                    in_channels=layer.in_features,
                    out_channels=layer.out_features,
                    stride=None,
                    macs_per_output=float(layer.weight.numel()),
                    samples=samples,
                )

    def _reduction(self, x: fx.Node, host: HostPlan) -> float:
        source = next(n for n in self.flow.nodes if n.op == "placeholder")
        whole, here = self.size.positions(self.shapes.get(source, ())), self.shapes.get(x)
        whole = self.size.whole if self.part.path or not whole else whole
        if host.stride is not None or not whole or here is None:
            return self.reduction[x]
        area = max(1, math.prod(here[1:-1]) - host.prefix_tokens)
        if area == 1 and math.prod(whole) > 1:
            return POOLED
        return float(round((math.prod(whole) / area) ** (1 / len(whole)), 6))

    def counted(self, host: HostPlan) -> bool:
        """Whether the reduction of a host of this graph is from the network's own input."""
        return bool(self.part.path and self.size.whole and self.shapes) and host.stride is None

    def _name(self, target: str) -> str:
        name = self.part.user_name(target)
        self.names[name] += 1
        return name + (f":{self.names[name]}" if self.names[name] > 1 else "")

    def _whole_branch(self) -> Iterator[tuple[int, float, HostPlan]]:
        """The graph as one host of tokens, whose result is added to its input in Python maybe."""
        result = output_node(self.part.gm.graph).args[0]
        last = result[0] if isinstance(result, (tuple, list)) and result else result
        x = next(iter(self.flow.activations), None)
        if x is None or not isinstance(last, fx.Node) or last is x or not self._dominates(x, last):
            return
        inside = self.flow.between(x, [last])
        first = (self.part.inputs or (None,))[0]
        whole = (
            isinstance(first, Tensor) and len(first) == self.size.samples
        )  # and no windows of it
        host = self._branch(x, last, inside) if whole and self.shapes.get(x) else None
        if host is not None and host.stride is None:
            yield self.flow.position[x], self._reduction(x, host), host

    # --- convolutions -----------------------------------------------------------------------------

    def _conv(self, first: fx.Node, last: fx.Node) -> HostPlan:
        x = self.flow.inputs(first)[0]
        chain = [n for n in self.flow.between(x, [last]) if type(module_of(self.gm, n)) in CONVS]
        spatial = next((n for n in chain if is_spatial(module_of(self.gm, n))), last)
        convs: list[Any] = [module_of(self.gm, n) for n in self._trunk(first, last)]
        macs, area = 0.0, 1
        for conv in reversed(convs):  # earlier ones work on larger maps
            macs += conv.weight.numel() * area
            area *= math.prod(conv.stride)
        return HostPlan(
            name=self._name(str(spatial.target)),
            source=x.name,
            readers=(first.name,),
            last=self.norm_of.get(last.name, last.name),
            in_channels=convs[0].in_channels,
            out_channels=convs[-1].out_channels,
            stride=tuple(math.prod(axis) for axis in zip(*(c.stride for c in convs), strict=True)),
            macs_per_output=macs,
        )

    def _trunk(self, first: fx.Node, last: fx.Node) -> list[fx.Node]:
        """The convolutions through which everything flows from `first` to `last`."""
        chain, node = [last], last
        while node is not first:
            before = self.flow.before[node]
            assert before is not None  # `first` dominates `last`
            node = before
            chain.append(node)
        return [n for n in reversed(chain) if type(module_of(self.gm, n)) in CONVS]

    def _neighbour(self, node: fx.Node, *, backwards: bool) -> fx.Node | None:
        """The pointwise convolution next to `node`, past what mixes no positions only."""
        chain = self.flow.before if backwards else self.flow.behind
        while True:
            step = chain[node]
            if step is None or not self._closed(step, node, backwards=backwards):
                return None
            layer = layer_called(self.gm, step)
            if is_pointwise(layer):
                if str(step.target) == self.head:
                    return None
                return step
            known = facts_of_call(step)
            product = known.does == "product" and known.elementwise
            if not (_is_elementwise(layer) or product):
                return None
            node = step

    def _closed(self, step: fx.Node, node: fx.Node, *, backwards: bool) -> bool:
        """Whether what lies between the two is read by nothing else, and mixes no positions."""
        first, last = (step, node) if backwards else (node, step)
        inside = self.flow.between(first, [last])
        if not all(user in inside for user in self.flow.readers(first)):
            return False
        for n in inside:
            if n is last:
                continue
            if not all(user in inside for user in self.flow.readers(n)):
                return False
            if is_spatial(module_of(self.gm, n)):
                return False
        return True

    # --- residual branches ------------------------------------------------------------------------

    def _branches(self, node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
        """(x, f(x)) for every reading of `node` as ``x + f(x)``."""
        operands = [a for a in node.args if isinstance(a, fx.Node) and a in self.flow.activations]
        if facts_of_call(node).does != "sum" or len(operands) != 2 or node.kwargs:
            return
        for x, last in (operands, operands[::-1]):
            if x is not last and len(last.users) == 1 and self._dominates(x, last):
                yield x, last

    def _dominates(self, x: fx.Node, node: fx.Node) -> bool:
        step: fx.Node | None = node
        while step is not None and self.flow.position[step] > self.flow.position[x]:
            step = self.flow.before[step]
        return step is x

    def _branch(
        self, x: fx.Node, last: fx.Node, inside: Nodes, *, deep: bool = False
    ) -> HostPlan | None:
        """A host of the whole branch, unless its convolutions are hosts by themselves."""
        layers = [layer for n in inside if (layer := module_of(self.gm, n)) is not None]
        dense = [c for c in layers if is_spatial(c) and not is_depthwise(c)]
        named = [str(n.target) for n in inside if n.op == "call_module" and has_weights(self.gm, n)]
        depthwise = [str(n.target) for n in inside if is_depthwise(module_of(self.gm, n))]
        if dense or not named or not mixes_channels(self.gm, inside, deep=deep):
            return None
        if any(
            user not in inside for n in inside if n is not last for user in self.flow.readers(n)
        ):
            return None
        if x in self.shapes and self.shapes[x] != self.shapes.get(last):
            return None
        channels, tokens = self._channels(x, inside)
        if channels is None:
            return None
        axes = self._axes(layers) if not tokens else 0
        samples = self.tokens.samples(x) if tokens else 0
        if samples is None or not (tokens or axes):
            return None
        here = self.shapes.get(last)
        positions = None if here is None else math.prod(here) / channels
        return HostPlan(
            name=self._name(depthwise[0] if depthwise else common_path(named)),
            source=x.name,
            readers=tuple(n.name for n in inside if x in n.all_input_nodes),
            last=self.norm_of.get(last.name, last.name),
            in_channels=channels,
            out_channels=channels,
            stride=None if tokens else (1,) * axes,
            macs_per_output=macs_per_position(self.gm, inside, self.shapes, positions),
            prefix_tokens=self.tokens.in_front(x) if tokens else 0,
            samples=samples,
        )

    def _axes(self, layers: list[nn.Module]) -> int:
        return next((c.weight.dim() - 2 for c in layers if isinstance(c, CONVS)), 0)

    def _channels(self, x: fx.Node, inside: Nodes) -> tuple[int | None, bool]:
        """Channels of `x`, and whether they are its last axis."""
        found: tuple[int | None, bool] = (None, False)
        for node in inside:
            layer = module_of(self.gm, node)
            if isinstance(layer, CONVS):
                found = (layer.in_channels, False)
            elif has_statistics(layer):
                found = (int(layer.num_features), False)  # type: ignore[union-attr, arg-type]
            elif isinstance(layer, nn.GroupNorm):
                found = (layer.num_channels, False)
            elif isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) == 1:
                found = (layer.normalized_shape[0], True)
            elif isinstance(layer, nn.Linear):
                found = (layer.in_features, True)
            elif isinstance(layer, nn.MultiheadAttention):
                found = (layer.embed_dim, layer.batch_first)
            if found[0] is not None:
                break
        shape = self.shapes.get(x)
        if shape is not None and found[0] is not None:
            axis = -1 if found[1] else 1
            if len(shape) < 3 or shape[axis] != found[0]:
                return None, False
        if (
            found[0] is not None
            and not found[1]
            and shape is None
            and not self._axes([m for n in inside if (m := module_of(self.gm, n)) is not None])
        ):
            return None, False
        return found


def _is_elementwise(layer: nn.Module | None) -> bool:
    return facts_of(layer).elementwise and (type(layer) not in BATCH_NORMS or has_statistics(layer))
