"""Tensors and networks without values: shapes, types and strides, and next to no memory."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_da3.errors import DA3Error
from lightning_da3.torch_private.fake import LOGGER, FakeCopyMode, FakeTensor, FakeTensorMode
from lightning_da3.torch_private.trees import tree_leaves


def fake_mode_of(network: nn.Module) -> FakeTensorMode | None:
    """The mode of a network's fake tensors; None if it has none."""
    return next((t.fake_mode for t in tensors_of(network) if isinstance(t, FakeTensor)), None)


def tensors_of(network: nn.Module) -> Iterator[Tensor]:
    """The parameters and buffers of a network."""
    yield from network.parameters()
    yield from network.buffers()


def left_by_forward(network: nn.Module) -> dict[int, Any]:
    """Copies, by id, of results that a forward left in modules: PyTorch refuses to copy these."""
    leaves = (leaf for m in network.modules() for leaf in tree_leaves(dict(vars(m))))
    left = (t for t in leaves if isinstance(t, Tensor) and t.grad_fn is not None)
    return {id(tensor): tensor.detach().clone() for tensor in left}


def without_values(network: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy of a network whose tensors have shapes, types and strides, and next to no memory.

    Args:
        network: Left unchanged; tensors on the meta device are on the CPU in the copy.
        mode: The mode of the copy's fake tensors.

    Raises:
        DA3Error: The network cannot be copied.
    """
    memo: dict[int, Any] = {
        key: result if isinstance(result, FakeTensor) else mode.from_tensor(result)
        for key, result in left_by_forward(network).items()
    }
    for tensor in tensors_of(network):
        if isinstance(tensor, FakeTensor) or tensor.device.type == "meta":
            with mode:
                twin = torch.empty_strided(
                    tensor.shape, tensor.stride(), dtype=tensor.dtype, device=_place(tensor)
                )
        else:
            twin = mode.from_tensor(tensor.detach())
        if isinstance(tensor, nn.Parameter):
            twin = nn.Parameter(twin, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = twin
    try:
        with FakeCopyMode(mode), quiet():  # whatever else holds values
            return copy.deepcopy(network, memo)
    except Exception as error:  # the user's own __deepcopy__ or state
        raise DA3Error(f"{type(network).__name__} cannot be copied: {error}") from error


def _place(tensor: Tensor) -> torch.device:
    return torch.device("cpu") if tensor.device.type == "meta" else tensor.device


def resized(x: Tensor, count: int) -> Tensor:
    """A tensor without values that is laid out as `x` is, with `count` samples along axis 0."""
    if x.dim() == 0:
        return x
    strides = x.stride()
    order = sorted(range(x.dim()), key=lambda axis: (-strides[axis], axis))
    size = [count, *x.shape[1:]]
    like = torch.empty([size[axis] for axis in order], dtype=x.dtype, device="meta")
    like = like.permute([order.index(axis) for axis in range(x.dim())])
    return like.requires_grad_(x.requires_grad)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """In the block PyTorch does not log what cannot run without values; errors say it."""
    log = logging.getLogger(LOGGER)
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before
