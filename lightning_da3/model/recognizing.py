"""A model that tells which domain a sample is of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_da3.budget.microbatches import samples_in
from lightning_da3.errors import ConfigError
from lightning_da3.model.batches import check_input
from lightning_da3.model.nearest import (
    check_known,
    joined_features,
    likeliest,
    new_statistics,
    read_hosts,
)
from lightning_da3.model.running import Running
from lightning_da3.nn.call import Call
from lightning_da3.torch_private.trees import tree_map_only


class Recognizes(Running):
    """What recognizes domains. Everything is an attribute of `DA3Model`; see there."""

    @torch.no_grad()
    def fit_statistics(self, name: str, batches: Iterable[Any]) -> None:
        """Learn what a domain's samples look like to the backbone, for `nearest_domains`.

        One pass over the samples, forward only. The statistics are saved with the domain; as the
        backbone never changes, they stay right however the domain is trained.

        Args:
            name: One of `domains`.
            batches: Its samples: tensors, as `forward` takes them first, or tuples or lists that
                begin with what it takes first, as loaders give them.

        Raises:
            DomainError: There is no such domain.
            ConfigError: `batches` are none.
            InputError: A batch does not fit the network, or there are fewer than two samples.
        """
        domain, device = self.domain(name), self._device
        if not isinstance(batches, Iterable):
            raise ConfigError(
                f"`batches` must be a list or a loader of batches, got {type(batches).__name__}."
            )
        statistics = new_statistics(self.plan, device)
        firsts = (batch[0] if isinstance(batch, (list, tuple)) else batch for batch in batches)
        statistics.fit(
            self._features(tree_map_only(Tensor, lambda x: x.to(device), first)) for first in firsts
        )
        domain.statistics = statistics

    @torch.no_grad()
    def nearest_domains(self, *args: Any, **kwargs: Any) -> list[str]:
        """The domain that each sample most likely belongs to, by the backbone's features of it.

        The one under whose Gaussian the features are likeliest (`lightning_da3.nn.statistics`).

        Args:
            args: As `forward` takes them.
            kwargs: As `forward` takes them.

        Returns:
            One of `domains` for every sample.

        Raises:
            DomainError: There is no domain, or one without statistics.
            InputError: The batch does not fit the network.
        """
        known = check_known({name: self.domain(name).statistics for name in self.domains})
        return likeliest(known, self._features(*args, **kwargs))

    def _features(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the backbone alone gives the adapters to read first and last, pooled: (N, D)."""
        check_input(args, self.plan)
        count = samples_in((*args, *kwargs.values()))
        found: dict[str, Tensor | None] = {host.name: None for host in read_hosts(self.plan)}
        self._run(Call(features=found), *args, **kwargs)
        return joined_features(found, count)
