"""What autograd knows of its nodes, and tensors of their memory."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from operator import attrgetter, methodcaller
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_da3.torch_private.finding import found, missing, needed

_NAMING = "naming what a module keeps"

next_node_number: Callable[[], int] = needed("torch._C._autograd:_get_sequence_nr", _NAMING)
"""The number of the node that autograd creates next in this thread."""

current_node: Callable[[], Any] = needed("torch._C:_current_autograd_node", _NAMING)
"""The node whose backward runs; None outside of a backward."""


def _never(_: Callable[[], None]) -> None:
    """What should be done afterwards is left undone."""


after_backward: Callable[[Callable[[], None]], None] = found(
    "torch.autograd:Variable._execution_engine.queue_callback", _never
)
"""Calls a function at the end of the backward pass that runs."""


def _attribute(path: str, get: Any, otherwise: Any) -> Any:
    return otherwise if found(path, None) is None else get


_NUMBER = "torch.autograd.function:BackwardCFunction._sequence_nr"
node_number: Callable[[Any], int] = _attribute(
    _NUMBER, methodcaller("_sequence_nr"), missing(_NUMBER, _NAMING)
)
"""The number of a node of autograd."""

_VERSION = "torch:Tensor._version"
version_of: Callable[[Tensor], int] = _attribute(
    _VERSION, attrgetter("_version"), missing(_VERSION, "seeing what is written into a tensor")
)
"""How often something was written into a tensor's memory."""

_BASE = "torch:Tensor._base"
base_of: Callable[[Tensor], Tensor | None] = _attribute(
    _BASE, attrgetter("_base"), missing(_BASE, "telling parameters from activations")
)
"""The tensor that a view was made of; None if the tensor is no view."""


def _maybe(_: Tensor) -> bool:
    return True


is_view: Callable[[Tensor], bool] = found("torch:Tensor._is_view", _maybe)
"""Whether a tensor is a view to autograd."""

storage_key: Callable[[torch.UntypedStorage], int] = _attribute(
    "torch:UntypedStorage._cdata", attrgetter("_cdata"), id
)
"""A number that a storage shares with no other one that is alive."""


def _set(x: Tensor, size: torch.Size) -> Tensor:
    return x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), size, x.stride())


without_base: Callable[[Tensor, torch.Size], Tensor] = found("torch:ops.aten._unsafe_view", _set)
"""A tensor of the same memory that is no view to autograd; given the tensor and its size."""

indices_of: Callable[[Tensor], Tensor] = found(
    "torch:Tensor._indices", lambda x: x.coalesce().indices()
)
"""The indices of a sparse COO tensor, as they lie in memory."""

values_of: Callable[[Tensor], Tensor] = found(
    "torch:Tensor._values", lambda x: x.coalesce().values()
)
"""The values of a sparse COO tensor, as they lie in memory."""


transform: Callable[[], Any] = found("torch._C._functorch:peek_interpreter_stack", lambda: None)
"""The functorch transform (`vmap`, `jvp`) that runs; None if none does."""


def _runs_checkpoint(_: bool) -> tuple[Callable[..., Any]] | None:
    """A function of `torch.utils.checkpoint`, if one runs."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__") != checkpoint.__module__:
        frame = frame.f_back
    return None if frame is None else (checkpoint,)


_top_hooks: Callable[[bool], Any] = found(
    "torch._C._autograd:_top_saved_tensors_default_hooks", _runs_checkpoint
)


def is_checkpointed() -> bool:
    """Whether what is kept now is dropped by `torch.utils.checkpoint`, and computed again."""
    hooks = _top_hooks(True)
    return hooks is not None and hooks[0].__module__ == checkpoint.__module__
