"""Backward passes of domains that are no longer active."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_da3.torch_private.autograd import after_backward
from lightning_da3.torch_private.trees import tree_leaves


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
        resting = [p for p in domain.parameters() if not p.requires_grad]
        for parameter in resting:
            parameter.requires_grad_(True)
        if resting:
            after_backward(lambda: None if is_active() else _rest_(resting))

    for tensor in _tensors(output):
        if tensor.grad_fn is not None:
            tensor.grad_fn.register_prehook(prepare)


def _rest_(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.requires_grad_(False)


def _tensors(output: Any) -> Iterator[Tensor]:
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            yield leaf
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            yield from _tensors(vars(leaf))
