"""What a node of a traced network calls."""

from __future__ import annotations

import math
from typing import TypeGuard

from torch import fx, nn

from lightning_da3.layers import BATCH_NORMS, CONVS, is_in_place, layer_of
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
