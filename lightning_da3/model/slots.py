"""The places where domains enter a backbone: one before every host, and the classifier's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn

from lightning_da3.model.domain import Domain
from lightning_da3.nn.adapter import HostInput, MixedAdapters
from lightning_da3.nn.head import HeadSlot, MixedHeads
from lightning_da3.passes.hosts import INPUTS, host_key
from lightning_da3.planning.plan import Plan


class Slots:
    """Where adapters and heads are put in, by reference.

    Args:
        backbone: The rewritten network.
        plan: The plan that it was rewritten by.

    Attributes:
        inputs: The places before the hosts, by host name in the order of the plan.
        head: The classifier's place, or None if every domain keeps the network's own.
    """

    def __init__(self, backbone: nn.Module, plan: Plan) -> None:
        self.inputs: dict[str, HostInput] = {}
        for part in plan.parts:
            gm = backbone.get_submodule(part.path)
            for host in part.hosts:
                place = gm.get_submodule(f"{INPUTS}.{host_key(host.name)}")
                self.inputs[host.name] = cast(HostInput, place)
        head = None if plan.head is None else backbone.get_submodule(plan.head)
        self.head = cast(HeadSlot | None, head)

    def head_of(self, domain: Domain | None) -> nn.Module | None:
        """The head that samples of a domain are computed by; None if all keep the network's own."""
        if self.head is None:
            return None
        return self.head.original if domain is None else domain.head

    def activate(self, domain: Domain | None) -> None:
        """Let one domain compute, or the backbone alone."""
        for host, place in self.inputs.items():
            place.set_active(None if domain is None else domain.adapter(host))
        if self.head is not None:
            self.head.set_active(None if domain is None else domain.head)

    @contextmanager
    def mixed(self, domains: Sequence[Domain | None], device: torch.device) -> Iterator[None]:
        """Inside, each sample is computed by its own domain.

        Args:
            domains: The domain of every sample of the batch; None: the backbone alone.
            device: Where the network computes.
        """
        adapters = {host: place.active for host, place in self.inputs.items()}
        head = None if self.head is None else self.head.active
        try:
            self._mix(domains, device)
            yield
        finally:
            for host, place in self.inputs.items():
                place.set_active(adapters[host])
            if self.head is not None:
                self.head.set_active(head)

    def _mix(self, domains: Sequence[Domain | None], device: torch.device) -> None:
        if len(set(domains)) < 2:  # there is nothing to tell apart
            self.activate(domains[0] if domains else None)
            return
        positions = {
            domain: torch.tensor([i for i, d in enumerate(domains) if d is domain], device=device)
            for domain in dict.fromkeys(domains)
        }
        named = [domain for domain in positions if domain is not None]
        own = [positions[domain] for domain in named]
        for host, place in self.inputs.items():
            adapters = [domain.adapter(host) for domain in named]
            place.set_active(MixedAdapters(host, adapters, own, len(domains)))
        if self.head is not None:
            heads = [cast(nn.Module, self.head_of(domain)) for domain in positions]
            self.head.set_active(MixedHeads(heads, list(positions.values())))
