"""What the optimizers of a Trainer hold: trained parameters, and no frozen ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_da3.errors import ConfigError
from lightning_da3.model.holder import Place


def join_domains_(optimizers: Iterable[torch.optim.Optimizer], places: Iterable[Place]) -> None:
    """Let the group that has a parameter of the active domain have those of all domains.

    What a LightningModule holds beside its network are the active domain's parameters, so that
    ``self.classifier.parameters()`` are of one domain alone.

    Args:
        optimizers: All of the Trainer's.
        places: Of parameters beside the network.
    """
    found = {id(parameter): place for place in places for parameter in place.every}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            names = group.get("param_names", group["params"])
            joined = [
                (own, name)
                for parameter, name in zip(group["params"], names, strict=True)
                for own in _in_place_of(parameter, found.get(id(parameter)))
            ]
            for key, i in (("params", 0), ("param_names", 1)):
                if key in group:
                    group[key][:] = [both[i] for both in joined]


def _in_place_of(parameter: Tensor, place: Place | None) -> list[Tensor]:
    if place is None:
        return [parameter]
    return place.learned if parameter is place.live else []


def not_optimized(
    optimizers: Iterable[torch.optim.Optimizer], places: Iterable[Place]
) -> list[str]:
    """Names of parameters beside the network that train in no optimizer, if there are any."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    held = {id(parameter) for group in groups for parameter in group["params"]}
    return [place.name for place in places if groups and id(place.live) not in held]


def take_over_(
    optimizers: Iterable[torch.optim.Optimizer],
    former: Iterable[Tensor],
    learned: Mapping[str, Tensor],
) -> None:
    """Let an optimizer that was made before the conversion train the domains.

    As LightningCLI makes that of ``--optimizer``. Where none holds a parameter of a domain, the
    group that had most of the network's gets them all; the network's are taken out of every group.

    Args:
        optimizers: All of the Trainer's.
        former: The network's parameters, as they were before the conversion.
        learned: The domains' parameters by name.
    """
    known, own = {id(p) for p in former}, {id(p) for p in learned.values()}
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    if any(id(p) in own for group in groups for p in group["params"]):
        return
    numbers = [sum(p.numel() for p in group["params"] if id(p) in known) for group in groups]
    most = max(numbers, default=0)
    for group, number in zip(groups, numbers, strict=True):
        if not number:
            continue
        new = [*learned.items()] if number == most else []
        kept = [id(parameter) not in known for parameter in group["params"]]
        for key, added in (("params", [p for _, p in new]), ("param_names", [n for n, _ in new])):
            if key in group:
                group[key][:] = [x for x, keep in zip(group[key], kept, strict=True) if keep]
                group[key] += added
        most = -1 if new else most


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
