"""The copy of the user's model that is traced, without what matters only while it trains."""

from __future__ import annotations

import copy
from contextlib import nullcontext

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lightning_da3.errors import ConversionError
from lightning_da3.layers import facts_of_kind
from lightning_da3.memory import fake_mode_of
from lightning_da3.memory.fake import left_by_forward
from lightning_da3.torch_private.fake import FakeCopyMode
from lightning_da3.torch_private.modules import FORWARD_HOOKS, hooks_of, original_of
from lightning_da3.tracing.layer_calls import DERIVED


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy of `model` in eval whose parameters are frozen, with PyTorch's own layers.

    Raises:
        ConversionError: It cannot be copied.
    """
    twin = _copy(model).eval()
    for parameter in twin.parameters():
        if not parameter.is_leaf:  # of copied ScriptModules
            parameter.detach_()
        parameter.requires_grad_(False)
    return _plain_(twin)


def _copy(model: nn.Module) -> nn.Module:
    memo = left_by_forward(model)
    mode = fake_mode_of(model)
    try:
        with nullcontext() if mode is None else FakeCopyMode(mode):
            return copy.deepcopy(model, memo)
    except Exception as error:  # the user's own __deepcopy__ or state
        raise ConversionError(
            f"{type(model).__name__} cannot be copied, and conversion never edits the caller's "
            f"model: copy.deepcopy failed with: {error}"
        ) from error


def _plain_(model: nn.Module) -> nn.Module:
    """`model` without what only matters while it trains or runs compiled."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            original = original_of(child)  # torch.compile: compile the converted network
            if original is not None:
                setattr(module, name, original)
        if parametrize.is_parametrized(module):
            kind = type(module)  # the caller's, too, and removing edits it
            own = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
            module.__class__ = type(kind.__name__, kind.__bases__, own)
            setattr(module, DERIVED, True)
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        (hooks,) = hooks_of(module, FORWARD_HOOKS[1:])
        for key, hook in list(hooks.items()):  # what there was before parametrisations
            if isinstance(hook, (WeightNorm, SpectralNorm)):
                setattr(module, DERIVED, True)
                hook.remove(module)
                del hooks[key]
        base = _same_layer(type(module))
        if base is not None:
            module.__class__ = base
    return (original_of(model) or model).requires_grad_(False)


def _same_layer(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The layer of PyTorch that `kind` is in all but its constructor and extra methods."""
    for base in kind.__mro__:
        if base.__module__.startswith("torch.nn.modules."):
            return base if base is not kind and facts_of_kind(base).function else None
        if "forward" in vars(base) or "_conv_forward" in vars(base) or "__call__" in vars(base):
            return None
    return None
