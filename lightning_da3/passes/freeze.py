"""``bn(conv(x))`` becomes ``conv'(x)``; every planned layer becomes its frozen twin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import fx, nn

from lightning_da3.config import DA3Config
from lightning_da3.layers import convolution_of, replacement_for
from lightning_da3.nn.activation import Sum
from lightning_da3.nn.convolution import FrozenConv, FrozenConvTranspose
from lightning_da3.nn.frozen import answer_as_, frozen
from lightning_da3.nn.normalization import FrozenAffine
from lightning_da3.planning.layers import layer_called
from lightning_da3.planning.plan import NodePlan, PartPlan
from lightning_da3.tracing.graphs import Part, module_of

STANDS_FOR = "stands_for"


def freeze_(part: Part, plan: PartPlan, config: DA3Config) -> None:
    """Swap in the frozen layers that the plan names, in the places that it names.

    ::

        relu(bn(conv(x)))       becomes   piecewise_linear_(frozen_conv(x))
        relu(bn(conv(x)) + y)   becomes   piecewise_linear_(frozen_conv(x) + y)
    """
    gm = part.gm
    nodes = {node.name: node for node in gm.graph.nodes}
    norms = {s.fold_into: nodes[s.name] for s in plan.nodes if s.action == "fold"}
    builders: dict[str, Callable[[fx.Node, NodePlan], nn.Module]] = {
        "freeze": lambda node, step: _convolution(part, node, norms.get(step.name), config),
        "affine": lambda node, step: FrozenAffine(
            cast(Any, module_of(gm, node)), step.inplace, part.user_name(str(node.target))
        ),
        "replace": lambda node, step: _replacement(part, node, step, config),
        "accumulate": lambda *_: Sum(),
    }
    steps = [step for step in plan.nodes if step.action in builders]
    # all are built before the first is put in: layers that are called twice, and layers inside of
    # others, are still there
    built = [
        (step, module_of(gm, nodes[step.name]), builders[step.action](nodes[step.name], step))
        for step in steps
    ]
    for step, called, layer in built:
        if called is not None:
            answer_as_(layer, called)
        _call(gm, nodes[step.name], step, layer)
    for step in plan.nodes:
        if step.gone:
            _bypass(gm, nodes[step.name])
    gm.delete_all_unused_submodules()


def _convolution(part: Part, node: fx.Node, norm: fx.Node | None, config: DA3Config) -> nn.Module:
    conv: Any = module_of(part.gm, node)
    if conv is None:
        return cast(Any, convolution_of(node.target, node.args, dict(node.kwargs)))[0]  # type: ignore[no-any-return]
    name, norm_name, folded = part.user_name(str(node.target)), None, None
    if norm is not None:
        norm_name, folded = part.user_name(str(norm.target)), cast(Any, module_of(part.gm, norm))
    return FrozenConv(conv, folded, name, norm_name, config.memory.stored_dtype)


def _replacement(part: Part, node: fx.Node, step: NodePlan, config: DA3Config) -> nn.Module:
    layer = layer_called(part.gm, node)
    replacement = None if layer is None else replacement_for(layer)
    assert replacement is not None and replacement.build is not None  # the plan looked
    built = replacement.build(step.inplace)
    if isinstance(built, FrozenConvTranspose):
        built.name = part.user_name(str(node.target))
        stored: torch.dtype = config.memory.stored_dtype or built.weight.dtype
        built.weight = frozen(built.weight.to(stored))
    return built


def _call(gm: fx.GraphModule, node: fx.Node, step: NodePlan, layer: nn.Module) -> None:
    """Let `node` call `layer`, in the step's place."""
    if step.action == "freeze" and node.op == "call_function":
        _, node.args = cast(Any, convolution_of(node.target, node.args, dict(node.kwargs)))
    elif step.action != "accumulate" and node.op != "call_module":
        node.args = node.args[:1]  # the layer was made of the others
    gm.add_submodule(step.place, layer)
    if node.op != "call_module":
        node.kwargs = {}
    node.op, node.target = "call_module", step.place


def _bypass(gm: fx.GraphModule, node: fx.Node) -> None:
    before = cast(fx.Node, node.args[0])
    before.meta[STANDS_FOR] = {*stands_for(before), *stands_for(node)}
    node.replace_all_uses_with(before)
    gm.graph.erase_node(node)


def stands_for(node: fx.Node) -> set[str]:
    """Names in the plan of what `node` computes: its own, and of nodes that are gone."""
    names: set[str] = node.meta.get(STANDS_FOR, set())
    return {node.name, *names}
