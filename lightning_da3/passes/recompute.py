"""``y = f(x)`` for a whole region becomes ``y, .. = recomputed(x, ..)``."""

from __future__ import annotations

import copy
import operator
from typing import Any

from torch import fx

from lightning_da3.config import DA3Config
from lightning_da3.nn.activation import QuantizedGradActivation
from lightning_da3.nn.convolution import FrozenConv
from lightning_da3.nn.recomputed import ActivatedConv, Excitation, Recomputed, Shortcut
from lightning_da3.passes.freeze import stands_for
from lightning_da3.passes.hosts import INPUTS, OUTPUTS
from lightning_da3.passes.subgraphs import call_instead_, copied
from lightning_da3.planning.flow import Flow, Nodes
from lightning_da3.planning.plan import PartPlan, RecomputeRegion
from lightning_da3.tracing.graphs import Part, module_of


def recompute_(part: Part, plan: PartPlan, config: DA3Config) -> None:
    """Put one module in the place of every planned region."""
    for region in plan.regions:
        _recompute(part.gm, region, config.memory.exact)


def _recompute(gm: fx.GraphModule, region: RecomputeRegion, exact: bool) -> None:
    inside = _inside(gm.graph, region)
    outer = {i: None for node in inside for i in node.all_input_nodes if i not in inside}
    x = next(i for i in outer if _hands_on(i, region.source))
    inputs = [x, *[i for i in outer if i is not x]]  # constants, and numbers of other tensors
    piece, copies = copied(inside, inputs)
    for node in inside:
        if node.args and node.args[0] is x:
            _leave_input_alone_(gm, copies[node], f"{region.place}_{node.name}")
    frozen = [i for i, node in enumerate(inputs) if stands_for(node) & {*region.frozen}]
    shortcut = _shortcut(gm, region, inside)
    module = Recomputed(fx.GraphModule(gm, piece), exact, shortcut, frozen)
    with gm.graph.inserting_before(next(iter(inside))):
        codes = _codes(gm.graph, x)
    call_instead_(
        gm, region.place, module, inside, inputs, {} if codes is None else {"codes": codes}
    )


def _shortcut(gm: fx.GraphModule, region: RecomputeRegion, inside: Nodes) -> Shortcut | None:
    """The region in the fewer operations of its form."""
    if region.form == "graph":
        return None
    layers: list[Any] = [module_of(gm, node) for node in inside]
    if region.form == "activated convolution":
        return ActivatedConv(*layers)
    first, *_ = layers
    activation = first if isinstance(first, QuantizedGradActivation) else None
    convs = [i for i, layer in enumerate(layers) if isinstance(layer, FrozenConv)]
    return Excitation(activation, layers[convs[0]], tuple(layers[convs[0] + 1 : -1]))


def _inside(graph: fx.Graph, region: RecomputeRegion) -> Nodes:
    """The region's nodes, what was put between them, and the items of what they return."""
    names = set(region.nodes)
    planned = [  # what is gone may have come right behind the source, which now stands for it
        node
        for node in graph.nodes
        if names & stands_for(node) and not _hands_on(node, region.source)
    ]
    inside = set(planned)
    if region.with_hosts:
        source = next(n for n in graph.nodes if region.source in stands_for(n))
        inside = set(Flow(graph).between(source, planned))
    for node in graph.nodes:
        is_item = node.target is operator.getitem and isinstance(node.args[1], int)
        if is_item and node.args[0] in inside:  # a part of a tensor is a value of its own
            inside.add(node)
    return {node: None for node in graph.nodes if node in inside}


def _leave_input_alone_(gm: fx.GraphModule, node: fx.Node, name: str) -> None:
    """What the region reads is kept, or read again: its first operation must not overwrite it."""
    if node.kwargs.get("inplace"):
        node.kwargs = {**node.kwargs, "inplace": False}
    layer = module_of(gm, node)
    if layer is not None and getattr(layer, "inplace", False):
        layer = copy.copy(layer)
        layer.inplace = False  # type: ignore[assignment]
        gm.add_submodule(name, layer)
        node.target = name


def _hands_on(node: fx.Node, source: str) -> bool:
    """Whether `node` is the source, or what hosts' outputs and inputs hand on of it."""
    if source in stands_for(node):
        return True
    if node.target is not operator.getitem or node.args[1] != 0:
        return False
    door = node.args[0]
    if not isinstance(door, fx.Node) or not str(door.target).startswith((INPUTS, OUTPUTS)):
        return False
    return any(_hands_on(i, source) for i in door.all_input_nodes)


def _codes(graph: fx.Graph, x: fx.Node) -> fx.Node | None:
    """Codes of what a host's input hands on, where its adapter keeps such."""
    door = x.args[0] if x.target is operator.getitem else None
    if not isinstance(door, fx.Node) or not str(door.target).startswith(INPUTS):
        return None
    return graph.call_function(operator.getitem, (door, 2))
