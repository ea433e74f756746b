"""Pieces that are computed again and have a hand-written backward, which needs fewer operations."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import fx, nn

from lightning_da3.layers import facts_of_call, is_in_place
from lightning_da3.nn.frozen import AdaptiveAvgPool, FrozenConv, QuantizedGradActivation
from lightning_da3.nn.recomputed import ActivatedConv, Excitation, Shortcut, Small
from lightning_da3.passes.subgraphs import exits_of
from lightning_da3.tracing.graphs import module_of

_SPATIAL = ((2, 3), [2, 3], (-2, -1), [-2, -1])


def shortcut_of(gm: fx.GraphModule, x: fx.Node, inside: Sequence[fx.Node]) -> Shortcut | None:
    """What computes the same, or None.

    Args:
        gm: A graph of frozen layers.
        x: What the piece reads.
        inside: The piece, in order.
    """
    if exits_of(inside) != [inside[-1]]:
        return None
    layers = [module_of(gm, node) for node in inside]
    if len(inside) == 2:
        return _activated_conv(layers) if _is_chain([x, *inside]) else None
    if (
        isinstance(layers[0], QuantizedGradActivation)
        and _is_chain([x, inside[0]])
        and _reads_input(layers[0])
    ):
        return _excitation(layers[0], inside[0], inside[1:], layers[1:])
    return _excitation(None, x, inside, layers)


def _is_chain(nodes: Sequence[fx.Node]) -> bool:
    """Whether each reads the one before, and nothing else."""
    return all(
        b.args[:1] == (a,) and b.all_input_nodes == [a] for a, b in itertools.pairwise(nodes)
    )


def _reads_input(activation: QuantizedGradActivation) -> bool:
    return not activation.smooth.reads_value


def _activated_conv(layers: Sequence[nn.Module | None]) -> ActivatedConv | None:
    """``silu(conv(x))``."""
    conv, activation = layers
    if not isinstance(conv, FrozenConv) or conv.slopes is not None or not conv.pads_zeros_alike:
        return None
    if not isinstance(activation, QuantizedGradActivation) or not _reads_input(activation):
        return None
    return ActivatedConv(conv, activation)


def _excitation(
    activation: QuantizedGradActivation | None,
    v: fx.Node,
    inside: Sequence[fx.Node],
    layers: Sequence[nn.Module | None],
) -> Excitation | None:
    """``v * s(mean(v))`` with pointwise convolutions and activations in s."""
    *branch, product = inside
    if len(branch) < 2 or not _is_chain([v, *branch]):
        return None
    facts = facts_of_call(product)
    times = facts.does == "product" and facts.elementwise and not is_in_place(product)
    if not times or {*product.args} != {v, branch[-1]}:
        return None
    first, *rest = layers[1:-1]
    if not (_is_matrix(first) and _is_mean(branch[0], layers[0], first)):
        return None
    small = [layer for layer in rest if _is_matrix(layer) or isinstance(layer, Small)]
    return Excitation(activation, first, tuple(small)) if len(small) == len(rest) else None


def _is_mean(node: fx.Node, layer: nn.Module | None, conv: FrozenConv) -> bool:
    """Whether it leaves `conv` one number of every channel, (N, C, 1, ..)."""
    if layer is not None:
        return isinstance(layer, AdaptiveAvgPool) and {*layer.grid} == {1}
    if node.target not in ("mean", torch.mean) or conv.weight.dim() != 4:
        return False
    arguments = dict(zip(("dim", "keepdim"), node.args[1:], strict=False)) | node.kwargs
    return arguments in [{"dim": dim, "keepdim": True} for dim in _SPATIAL]


def _is_matrix(layer: nn.Module | None) -> TypeGuard[FrozenConv]:
    if not isinstance(layer, FrozenConv):
        return False
    return layer.groups == 1 and not any(layer.pad) and layer.weight[0, 0].numel() == 1
