"""``bn(conv(x))`` becomes ``conv'(x)``; every planned layer becomes its frozen twin."""

from __future__ import annotations

from typing import Any, cast

from torch import fx

from lightning_da3.config import DA3Config
from lightning_da3.nn.frozen import FrozenAffine, FrozenConv
from lightning_da3.planning import NodePlan, Plan, layer_called
from lightning_da3.registry import replacement_for
from lightning_da3.tracing import module_of


def freeze_(gm: fx.GraphModule, plan: Plan, config: DA3Config) -> None:
    """Swap in the frozen layers that the plan names.

    ::

        relu(bn(conv(x)))   becomes   two_slopes_(frozen_conv(x))
    """
    del config
    nodes = {node.name: node for node in gm.graph.nodes}
    norm_of = {step.fold_into: nodes[step.name] for step in plan.nodes if step.fold_into}
    originals = dict(gm.named_modules())  # by name: a later call of a layer still finds it
    for step in plan.nodes:
        node = nodes[step.name]
        name = str(node.target)
        if step.action == "freeze":
            if not isinstance(module_of(gm, node), FrozenConv):  # else an earlier call did it
                norm = norm_of.get(step.name)
                norm_name = None if norm is None else str(norm.target)
                gm.set_submodule(name, _frozen_conv(originals, name, norm_name))
        elif step.action == "affine":
            _call(gm, node, FrozenAffine(cast(Any, originals[name]), step.inplace, name))
        elif step.action == "replace":
            _replace(gm, node, step)
    for step in plan.nodes:
        if step.action in ("fold", "remove"):
            _bypass(gm, nodes[step.name])
    gm.delete_all_unused_submodules()


def _frozen_conv(originals: dict[str, Any], name: str, norm_name: str | None) -> FrozenConv:
    norm = None if norm_name is None else originals[norm_name]
    return FrozenConv(originals[name], norm, name, norm_name)


def _replace(gm: fx.GraphModule, node: fx.Node, step: NodePlan) -> None:
    layer = layer_called(gm, node)
    replacement = None if layer is None else replacement_for(layer)
    assert replacement is not None and replacement.build is not None  # the plan looked
    _call(gm, node, replacement.build(step.inplace))


def _call(gm: fx.GraphModule, node: fx.Node, layer: Any) -> None:
    """Let `node` call `layer` on its first argument. A place of its own: calls may differ."""
    name = f"frozen_{node.name}"
    gm.add_submodule(name, layer)
    node.op, node.target = "call_module", name
    node.args, node.kwargs = node.args[:1], {}


def _bypass(gm: fx.GraphModule, node: fx.Node) -> None:
    node.replace_all_uses_with(cast(fx.Node, node.args[0]))
    gm.graph.erase_node(node)
