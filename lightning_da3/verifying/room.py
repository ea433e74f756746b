"""Whether there is memory to run copies of a network."""

from __future__ import annotations

import gc
import math

import torch
from torch import nn

from lightning_da3.errors import ConfigError
from lightning_da3.formatting import format_bytes
from lightning_da3.memory.fake import tensors_of
from lightning_da3.memory.free import free_bytes

_COMPUTING = 0.25  # of the weights: what a pass may take beside them


class NoRoom(Exception):  # noqa: N818  # it says so, and nobody sees it
    """Memory does not suffice to run a network."""


def needed_bytes(network: nn.Module, dtype: torch.dtype | None = None, *, own: bool = False) -> int:
    """About what a run of a copy by `lightning_da3.verifying.shadows.shadow` takes.

    Args:
        network: The network.
        dtype: Of the copy; None: as they are, in which case the copy shares its weights.
        own: It has weights of its own nevertheless.
    """
    held, copied = 0, 0
    for tensor in tensors_of(network):
        size = tensor.numel() * tensor.element_size()
        held += size
        if dtype is not None and tensor.is_floating_point() and tensor.dtype != dtype:
            copied += tensor.numel() * dtype.itemsize
        elif own:
            copied += size
    return copied + int(_COMPUTING * max(held, copied))


def free_for(network: nn.Module) -> float:
    """The bytes that are free where a network is; infinite where the system does not say."""
    first = next(iter(tensors_of(network)), torch.empty(0))
    try:
        return free_bytes(first.device)
    except ConfigError:
        return math.inf


def lack_of_room(network: nn.Module, dtype: torch.dtype | None = None, *, own: bool = False) -> str:
    """What is needed, see `needed_bytes`, and what there is; "" where it suffices."""
    needed, free = needed_bytes(network, dtype, own=own), free_for(network)
    if needed > free:
        gc.collect()
        free = free_for(network)
    if needed <= free:
        return ""
    return f"that takes about {format_bytes(needed)}, and {format_bytes(int(free))} are free"
