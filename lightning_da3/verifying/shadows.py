"""Copies of a network to run: what a forward leaves behind stays in the copy."""

from __future__ import annotations

import copy
import gc

import torch
from torch import fx, nn

from lightning_da3.memory.fake import left_by_forward, tensors_of
from lightning_da3.torch_private.modules import FORWARD_HOOKS, HOOKS_WITH_KWARGS, hooks_of, silence_
from lightning_da3.tracing.graph_modules import UserGraph

LARGE = 1e8  # numbers: of a network of which no copy should be there for nothing
_KINDS = (*FORWARD_HOOKS, *HOOKS_WITH_KWARGS)


def shadow(network: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of a network in eval whose parameters need no gradient.

    Args:
        network: Left unchanged.
        dtype: Of the copy's parameters and buffers, where they are floating-point; None: as they
            are, and parameters share their memory with the network's.
    """
    if sum(t.numel() for t in tensors_of(network)) > LARGE:
        gc.collect()  # graphs and their modules refer to each other: copies that are gone linger
    memo = left_by_forward(network)
    for tensor in tensors_of(network):
        cast = dtype is not None and tensor.is_floating_point() and tensor.dtype != dtype
        value = tensor.detach().to(dtype) if cast else tensor.detach()
        if isinstance(tensor, nn.Parameter):
            memo[id(tensor)] = nn.Parameter(value, requires_grad=False)
        else:
            memo[id(tensor)] = value if cast else value.clone()
    copied = copy.deepcopy(network, memo).eval()
    for module, twin in zip(network.modules(), copied.modules(), strict=True):
        if isinstance(twin, fx.GraphModule):
            silence_(twin)  # guesses may not fit
        bare = isinstance(module, fx.GraphModule) and not isinstance(module, UserGraph)
        if bare:  # copies of such have none of its hooks
            for ours, theirs in zip(hooks_of(twin, _KINDS), hooks_of(module, _KINDS), strict=True):
                ours.update(theirs)
    return copied
