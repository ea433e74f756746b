"""What the optimizers of a Trainer hold: trained parameters, and no frozen ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_da3.errors import ConfigError


def drop_frozen_(optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Take parameters that require no gradient out of the groups and out of the state.

    Groups that become empty stay: schedulers hold one learning rate a group.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            trained = [parameter.requires_grad for parameter in group["params"]]
            for key in ("params", "param_names"):
                if key in group:  # in place: an optimizer may hold the list itself
                    group[key][:] = [x for x, keep in zip(group[key], trained, strict=True) if keep]
        state: dict[Any, Any] = optimizer.state
        for frozen in [k for k in state if isinstance(k, Tensor) and not k.requires_grad]:
            del state[frozen]


def check_learns(
    optimizers: Iterable[torch.optim.Optimizer], learned: Iterable[nn.Parameter], what: str
) -> None:
    """Refuse optimizers that would leave the domains as they are.

    Args:
        optimizers: All of the Trainer's; with none at all, the user steps by hand.
        learned: Parameters of the domains.
        what: The domains, for the error.

    Raises:
        ConfigError: None of them holds a parameter of a domain.
    """
    known = {id(parameter) for parameter in learned}
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    if groups and not any(id(p) in known for group in groups for p in group["params"]):
        raise ConfigError(
            f"No optimizer holds a parameter of {what}, so nothing would be learned. Give it "
            "`self.parameters()` in configure_optimizers: what is frozen is taken out."
        )
