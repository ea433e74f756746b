"""Which batch norms, and which activations, go into the convolution before them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import fx

from lightning_da3.layers import CONVS, replacement_for
from lightning_da3.nn.frozen import PiecewiseLinear
from lightning_da3.planning.layers import has_statistics, layer_called
from lightning_da3.planning.plan import HostPlan, NodePlan, RecomputeRegion
from lightning_da3.tracing.graphs import module_of


def _calls(gm: fx.GraphModule) -> Counter[int]:
    return Counter(id(m) for n in gm.graph.nodes if (m := module_of(gm, n)) is not None)


def find_folds(gm: fx.GraphModule, head: str | None) -> Iterator[tuple[str, str]]:
    """(batch norm node, convolution node): ``bn(conv(x))`` where nobody else reads conv(x)."""
    calls = _calls(gm)
    for node in gm.graph.nodes:
        norm = module_of(gm, node)
        if not has_statistics(norm):
            continue
        before = node.args[0]
        conv = module_of(gm, before) if isinstance(before, fx.Node) else None
        if (
            type(conv) in CONVS
            and len(before.users) == 1
            and calls[id(conv)] == 1
            and calls[id(norm)] == 1
            and str(before.target) != head
        ):
            yield node.name, before.name


def fused(
    gm: fx.GraphModule,
    steps: Sequence[NodePlan],
    hosts: Sequence[HostPlan],
    regions: Sequence[RecomputeRegion],
) -> tuple[NodePlan, ...]:
    """The same steps, with ``relu(conv(x))`` as one operation where nothing lies between the two.

    Args:
        gm: A traced network.
        steps: What becomes of every node.
        hosts: Adapters write behind the last node of each.
        regions: What is computed again: of both nodes, or of neither.
    """
    plan = {step.name: step for step in steps}
    nodes = {node.name: node for node in gm.graph.nodes}
    calls = _calls(gm)
    between = {host.last for host in hosts} | {region.source for region in regions}

    def home(name: str) -> tuple[bool, ...]:
        return tuple(name in region.nodes for region in regions)

    def with_conv(step: NodePlan) -> NodePlan:
        if step.action != "replace" or not _is_two_slopes(gm, nodes[step.name]):
            return step
        inner = []
        node = nodes[step.name].args[0]
        while isinstance(node, fx.Node) and len(node.users) == 1 and node.name not in between:
            inner.append(node)
            if plan.get(node.name, step).action not in ("fold", "remove"):
                break
            node = node.args[0]
        conv = inner[-1] if inner else None
        layer = None if conv is None else module_of(gm, conv)
        whole = type(layer) in CONVS and plan[inner[-1].name].action == "freeze"
        if not whole or calls[id(layer)] > 1:
            return step
        if any(home(node.name) != home(step.name) for node in inner):
            return step
        return replace(step, action="fuse", fold_into=inner[-1].name)

    return tuple(with_conv(step) for step in steps)


def _is_two_slopes(gm: fx.GraphModule, node: fx.Node) -> bool:
    layer = layer_called(gm, node)
    found = None if layer is None else replacement_for(layer)
    return bool(found and found.build and isinstance(found.build(False), PiecewiseLinear))
