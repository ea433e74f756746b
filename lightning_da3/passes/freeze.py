"""``relu(bn(conv(x)))`` becomes ``conv'(x)``; every planned layer becomes its frozen twin."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import fx, nn

from lightning_da3.config import DA3Config, MemoryConfig
from lightning_da3.layers import convolution_of, replacement_for
from lightning_da3.nn.frozen import (
    FrozenAffine,
    FrozenConv,
    FrozenConvTranspose,
    PiecewiseLinear,
    Sum,
    frozen,
)
from lightning_da3.planning.layers import layer_called
from lightning_da3.planning.plan import NodePlan, PartPlan
from lightning_da3.tracing.graphs import Part, module_of

STANDS_FOR = "stands_for"


def freeze_(part: Part, plan: PartPlan, config: DA3Config) -> None:
    """Swap in the frozen layers that the plan names.

    ::

        relu(bn(conv(x)))       becomes   frozen_conv(x), with slopes
        relu(bn(conv(x)) + y)   becomes   two_slopes_(frozen_conv(x) + y)
    """
    gm = part.gm
    nodes = {node.name: node for node in gm.graph.nodes}
    norm_of = {s.fold_into: nodes[s.name] for s in plan.nodes if s.action == "fold"}
    originals = dict(gm.named_modules())  # by name: a later call of a layer still finds it
    for step in plan.nodes:
        node = nodes[step.name]
        name = str(node.target)
        if step.action == "freeze" and node.op == "call_function":
            conv, args = cast(Any, convolution_of(node.target, node.args, dict(node.kwargs)))
            _call(gm, node, conv, args)
        elif step.action == "freeze":
            if not isinstance(module_of(gm, node), FrozenConv):  # else an earlier call did it
                norm = norm_of.get(step.name)
                norm_name = None if norm is None else str(norm.target)
                stored_dtype = config.memory.stored_dtype
                gm.set_submodule(name, _frozen_conv(part, originals, name, norm_name, stored_dtype))
        elif step.action == "affine":
            affine = FrozenAffine(cast(Any, originals[name]), step.inplace, part.user_name(name))
            _call(gm, node, affine)
        elif step.action == "replace":
            _replace(part, node, step, config.memory)
        elif step.action == "accumulate":
            _call(gm, node, Sum(), node.args)
        elif step.action == "fuse":
            conv = cast(FrozenConv, module_of(gm, nodes[cast(str, step.fold_into)]))
            conv.slopes = cast(PiecewiseLinear, _replacement(part, node, step)).slopes
    for step in plan.nodes:
        if step.action in ("fold", "fuse", "remove"):
            _bypass(gm, nodes[step.name])
    gm.delete_all_unused_submodules()


def _frozen_conv(
    part: Part,
    originals: dict[str, Any],
    name: str,
    norm_name: str | None,
    stored_dtype: torch.dtype | None,
) -> FrozenConv:
    norm = None if norm_name is None else originals[norm_name]
    norm_name = None if norm_name is None else part.user_name(norm_name)
    return FrozenConv(originals[name], norm, part.user_name(name), norm_name, stored_dtype)


def _replace(part: Part, node: fx.Node, step: NodePlan, memory: MemoryConfig) -> None:
    built = _replacement(part, node, step)
    if isinstance(built, FrozenConvTranspose):
        built.name = part.user_name(str(node.target))
        built.weight = frozen(built.weight.to(memory.stored_dtype or built.weight.dtype))
    _call(part.gm, node, built)


def _replacement(part: Part, node: fx.Node, step: NodePlan) -> nn.Module:
    layer = layer_called(part.gm, node)
    replacement = None if layer is None else replacement_for(layer)
    assert replacement is not None and replacement.build is not None  # the plan looked
    return replacement.build(step.inplace)


def _call(
    gm: fx.GraphModule, node: fx.Node, layer: Any, args: tuple[Any, ...] | None = None
) -> None:
    """Let `node` call `layer`, by default on its first argument; in a place of its own."""
    name = f"frozen_{node.name}"
    gm.add_submodule(name, layer)
    node.op, node.target = "call_module", name
    node.args, node.kwargs = node.args[:1] if args is None else args, {}


def _bypass(gm: fx.GraphModule, node: fx.Node) -> None:
    before = cast(fx.Node, node.args[0])
    before.meta[STANDS_FOR] = {*stands_for(before), *stands_for(node)}
    node.replace_all_uses_with(before)
    gm.graph.erase_node(node)


def stands_for(node: fx.Node) -> set[str]:
    """Names in the plan of what `node` computes: its own, and of nodes that are gone."""
    names: set[str] = node.meta.get(STANDS_FOR, set())
    return {node.name, *names}
