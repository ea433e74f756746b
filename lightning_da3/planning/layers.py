"""What a node of a traced network calls."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TypeGuard

from torch import fx, nn

from lightning_da3.layers import BATCH_NORMS, CONVS, facts_of, is_in_place, layer_of
from lightning_da3.nn.convolution import Conv
from lightning_da3.planning.plan import NodePlan
from lightning_da3.tracing.graphs import module_of


def layer_called(gm: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The layer that `node` calls, or that does what its function or method does."""
    if node.op in ("call_function", "call_method") and node.args:
        return layer_of(node.target, node.args[1:], dict(node.kwargs))
    return module_of(gm, node)


def overwrites(gm: fx.GraphModule, node: fx.Node, step: NodePlan | None) -> bool:
    """Whether `node`, which becomes what `step` says, writes into its first argument."""
    asked = getattr(layer_called(gm, node), "inplace", False) or node.kwargs.get("inplace")
    return is_in_place(node) or bool(asked) or (step is not None and step.inplace)


def has_statistics(layer: nn.Module | None) -> bool:
    """Whether it is a batch norm that computes with running statistics in eval."""
    return type(layer) in BATCH_NORMS and layer.running_mean is not None  # type: ignore[union-attr]


def is_spatial(layer: nn.Module | None) -> bool:
    """Whether it is a convolution whose window is larger than one pixel."""
    return _is_conv(layer) and math.prod(layer.kernel_size) > 1


def is_pointwise(layer: nn.Module | None) -> bool:
    """Whether it is a convolution of single pixels over all channels."""
    return _is_conv(layer) and math.prod(layer.kernel_size) == layer.groups == 1


def is_depthwise(layer: nn.Module | None) -> bool:
    """Whether it is a convolution that mixes no channels."""
    return _is_conv(layer) and 1 < layer.groups == layer.in_channels


def _is_conv(layer: nn.Module | None) -> TypeGuard[Conv]:
    return type(layer) in CONVS


def has_weights(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether `node` calls a layer with parameters."""
    layer = module_of(gm, node)
    return layer is not None and any(True for _ in layer.parameters())


def mixes_channels(gm: fx.GraphModule, inside: Iterable[fx.Node], *, deep: bool = False) -> bool:
    """Whether one of these nodes is a linear map over channels.

    Args:
        gm: The graph's module.
        inside: Of its nodes.
        deep: Whether a module that is one node, and holds such a layer, is one as well.
    """
    called = [layer for n in inside if (layer := module_of(gm, n)) is not None]
    layers = [inner for layer in called for inner in layer.modules()] if deep else called
    return any(facts_of(layer).mixes_channels for layer in layers) or any(
        i.op == "get_attr" and str(i.target).endswith("weight")
        for n in inside
        for i in n.all_input_nodes
    )


def common_path(targets: list[str]) -> str:
    """What dotted names have in common: the block that holds them."""
    split = [target.split(".") for target in targets]
    common = []
    for names in zip(*split, strict=False):
        if len(set(names)) > 1:
            break
        common.append(names[0])
    return ".".join(common) or targets[-1]
