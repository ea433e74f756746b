"""Backward passes of domains that are no longer active."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from lightning_da3.torch_private.autograd import after_backward
from lightning_da3.torch_private.trees import tree_leaves

_WAITS = "lightning_da3.waits"


def trains_later_(output: Any, domain: nn.Module, is_active: Callable[[], bool]) -> None:
    """Let a domain's parameters get the gradients of an output whatever domain is active by then.

    A parameter that requires no gradient when a backward pass reaches it gets none, silently. So
    parameters of a domain that rests require one while a backward pass of an earlier output runs.

    Args:
        output: Any nesting of tensors and dataclasses.
        domain: What was active when it was computed.
        is_active: Whether the domain is active now.
    """
    if torch.compiler.is_compiling():
        return

    def prepare(_: Any) -> None:
        if is_active():
            return
        resting: list[Tensor] = [p for p in domain.parameters() if not p.requires_grad]
        for parameter in resting:
            parameter.requires_grad_(True)
        if resting:
            after_backward(lambda: None if is_active() else _rest_(resting))

    for tensor in _tensors(output):
        if tensor.grad_fn is not None:
            tensor.grad_fn.register_prehook(prepare)


@torch.inference_mode(False)
def rest_(parameters: Iterable[Tensor], is_active: Callable[[], bool]) -> None:
    """Parameters require no gradient from now on, but get those of losses that there are already.

    Wherever a loss reads them: also behind, beside and without the network.

    Args:
        parameters: Leaves.
        is_active: Whether they are to require a gradient at the time.
    """
    for parameter in parameters:
        if parameter.requires_grad:
            _wait_(parameter, is_active)
            parameter.requires_grad_(False)


def _wait_(parameter: Tensor, is_active: Callable[[], bool]) -> None:
    """Let a parameter require a gradient when a backward pass that knows it brings it one."""
    node: Any = get_gradient_edge(parameter).node  # a new one is gone at once, and nothing waits
    if _WAITS in node.metadata:
        return

    def prepare(_: Any) -> None:
        if not parameter.requires_grad:
            parameter.requires_grad_(True)
            after_backward(lambda: None if is_active() else _rest_([parameter]))

    node.metadata[_WAITS] = node.register_prehook(prepare)


def _rest_(parameters: list[Tensor]) -> None:
    for parameter in parameters:
        parameter.requires_grad_(False)


def _tensors(output: Any) -> Iterator[Tensor]:
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            yield leaf
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            yield from _tensors(vars(leaf))
