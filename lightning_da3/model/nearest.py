"""The domain that a sample most likely belongs to, by the backbone's features of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_da3.errors import DomainError, InputError
from lightning_da3.nn.statistics import Statistics
from lightning_da3.planning.plan import HostPlan, Plan


def read_hosts(plan: Plan) -> list[HostPlan]:
    """The hosts whose inputs tell domains apart: the first by style, the last by content."""
    hosts = plan.hosts
    return [hosts[0], hosts[-1]] if len(hosts) > 1 else [hosts[0]]


def new_statistics(plan: Plan, device: torch.device | str) -> Statistics:
    """Statistics of the features that `joined_features` gives, before they are fitted."""
    return Statistics([host.in_channels for host in read_hosts(plan)]).to(device)


def joined_features(found: Mapping[str, Tensor | None], count: int) -> Tensor:
    """What the backbone gives some hosts to read, pooled, side by side: (N, D).

    Args:
        found: What each of them reads, (N, C), by its name; None: it was not called.
        count: The number of samples of the batch.

    Raises:
        InputError: The hosts do not read one row for every sample.
    """
    rows = [features for features in found.values() if features is not None]
    for features in rows:
        if len(features) != count:
            raise InputError(_NOT_APART.format(len(features), count))
    if len(rows) < len(found):
        raise InputError(_NOT_APART.format(0, count))
    return torch.cat(rows, dim=1)


_NOT_APART = (
    "The network reads {} rows of features from {} samples, which cannot be told apart: nearest "
    "domains need a host that works on whole batches."
)


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
