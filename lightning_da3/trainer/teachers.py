"""What a LightningModule did with its network before the conversion: copies of it, and hooks.

A momentum teacher (BYOL, MoCo) is a deep copy of the network, moved towards it parameter by
parameter. It must be a copy of the converted network then, or the parameters are others.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_da3.model.model import DA3Model
from lightning_da3.torch_private.modules import gradient_hooks


def copies_of(module: nn.Module, network: nn.Module) -> list[str]:
    """Dotted names of the parts of a module that are copies of a network in it, to the last bit."""
    kind = type(network)
    if not any(type(child) is kind and child is not network for child in module.modules()):
        return []
    state = network.state_dict()
    return [
        name
        for name, child in module.named_modules()
        if type(child) is kind and child is not network and _is_equal(child.state_dict(), state)
    ]


def _is_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(
        isinstance(value, Tensor)
        and value.shape == other[name].shape
        and value.device == other[name].device
        and torch.equal(value, other[name])
        for name, value in one.items()
    )


def convert_copies_(module: nn.Module, names: Iterable[str], model: DA3Model) -> None:
    """Let copies of a network be copies of the converted one, which train nothing themselves.

    Where domains have heads of their own that is not what was copied, and a warning says so.

    Args:
        module: Holds them.
        names: Dotted names of the copies.
        model: The converted network, its domain active.
    """
    names = list(names)
    if names and model.plan.head is not None:
        rank_zero_warn(
            f"{names} are copies of the network from before the conversion, and stay as they are. "
            "A momentum teacher, which `training_step` moves towards the network, must be a copy "
            "of the converted one: leave the classifier outside of the network (it belongs to the "
            "domain there as well), and it becomes one."
        )
        return
    if names:
        rank_zero_info(
            f"DA3: {names}, copies of the network, are copies of the converted one, which follow "
            "its domains and train nothing themselves."
        )
    for name in names:
        twin = copy.deepcopy(model)
        twin.follows, twin.shared = True, None
        for domain in map(twin.domain, twin.domains):
            domain.outside = None  # the module that holds both has one
        module.set_submodule(name, twin.requires_grad_(False))


def follow_(module: nn.Module, model: DA3Model, domain: str | None) -> None:
    """Let copies of a converted network have its domains, and the same one active."""
    for twin in module.modules():
        if isinstance(twin, DA3Model) and twin.follows and twin.fingerprint == model.fingerprint:
            for name in model.domains:
                if name not in twin.domains:
                    twin.bank[name] = copy.deepcopy(model.domain(name)).requires_grad_(False)
                    twin.domain(name).outside = None
                twin.skip(name, model.skipped(name))
            twin.set_domain(domain)


def tell_of_hooks(network: nn.Module) -> None:
    """Warn of hooks on gradients of a network that is about to be frozen.

    Those of W&B are set again (`lightning_da3.trainer.watching`).
    """
    hooks = [hook for hook in gradient_hooks(network) if not is_of_wandb(hook)]
    if hooks:
        rank_zero_warn(
            f"{len(hooks)} hooks on gradients of {type(network).__name__} were set before the "
            "conversion and see nothing: its parameters are frozen, domains have others. Set them "
            "in `on_fit_start` of the LightningModule, when it is converted."
        )


def is_of_wandb(hook: Any) -> bool:
    """Whether W&B set a hook: its function is W&B's."""
    return str(getattr(hook, "__module__", "")).partition(".")[0] == "wandb"
