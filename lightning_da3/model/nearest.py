"""The domain that a sample most likely belongs to, by the backbone's features of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from lightning_da3.errors import DomainError, InputError
from lightning_da3.nn.adapter import HostInput
from lightning_da3.nn.statistics import Statistics
from lightning_da3.planning.plan import HostPlan, Plan


def read_hosts(plan: Plan) -> list[HostPlan]:
    """The hosts whose inputs tell domains apart: the first by style, the last by content."""
    hosts = plan.hosts
    return [hosts[0], hosts[-1]] if len(hosts) > 1 else [hosts[0]]


def new_statistics(plan: Plan, device: torch.device | str) -> Statistics:
    """Statistics of the features that `features_of` gives, before they are fitted."""
    return Statistics([host.in_channels for host in read_hosts(plan)]).to(device)


def features_of(places: Sequence[HostInput], run: Callable[[], object], count: int) -> Tensor:
    """What the backbone gives some hosts to read, pooled: (N, D).

    Args:
        places: The inputs of the hosts.
        run: Computes the backbone alone.
        count: The number of samples that it computes.

    Raises:
        InputError: The hosts do not read one row for every sample.
    """
    found: dict[nn.Module, Tensor] = {}

    def note(place: nn.Module, inputs: tuple[Tensor]) -> None:
        found[place] = cast(HostInput, place).features(inputs[0])

    hooks = [place.register_forward_pre_hook(note) for place in places]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    for place in places:
        rows = len(found.get(place, ()))
        if rows != count:
            raise InputError(
                f"The network reads {rows} rows of features from {count} samples, which cannot be "
                "told apart: nearest domains need a host that works on whole batches."
            )
    return torch.cat([found[place] for place in places], dim=1)


def check_known(statistics: Mapping[str, Statistics | None]) -> dict[str, Statistics]:
    """The statistics of all domains, by name.

    Raises:
        DomainError: There is no domain, or one without statistics.
    """
    known = {name: found for name, found in statistics.items() if found is not None}
    lacking = [name for name in statistics if name not in known]
    if lacking or not known:
        what = f"The domains {lacking} have no statistics" if lacking else "There is no domain"
        raise DomainError(
            f"{what} to be found by. `fit_statistics(name, batches)` learns them from samples; "
            "`domains=[..]` takes names instead."
        )
    return known


def likeliest(known: Mapping[str, Statistics], features: Tensor) -> list[str]:
    """For every sample the domain under whose Gaussian its features (N, D) are likeliest."""
    names = list(known)
    likelihoods = torch.stack([known[name].log_likelihood(features) for name in names])
    return [names[i] for i in likelihoods.argmax(0).tolist()]
