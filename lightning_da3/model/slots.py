"""The places where domains enter a backbone: one before every host, and the classifier's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from lightning_da3.model.domain import Domain
from lightning_da3.nn.adapter import MixedAdapters
from lightning_da3.nn.call import Call, Calls, Place
from lightning_da3.nn.head import HeadSlot, MixedHeads
from lightning_da3.planning.plan import Plan


class Slots:
    """What calls of a backbone compute with, for any domains.

    Args:
        backbone: The rewritten network.
        plan: The plan that it was rewritten by.

    Attributes:
        hosts: The names of the hosts, in the order of the plan.
        head: The classifier's place, or None if every domain keeps the network's own.
    """

    def __init__(self, backbone: nn.Module, plan: Plan) -> None:
        self.hosts = [host.name for host in plan.hosts]
        self.head = None if plan.head is None else _slot_in(backbone.get_submodule(plan.head))

    def head_of(self, domain: Domain | None) -> nn.Module | None:
        """The head that samples of a domain are computed by; None if all keep the network's own."""
        if self.head is None:
            return None
        return self.head.original if domain is None else domain.head

    def call(self, domain: Domain | None) -> Call:
        """One domain computes, or the backbone alone."""
        if domain is None:
            return Call()
        adapters = {host: domain.adapter(host) for host in self.hosts}
        return Call(adapters, domain.head, domain.loss_unit, skipped=frozenset(domain.skipped))

    def mixed(self, domains: Sequence[Domain | None], device: torch.device) -> Call:
        """Each sample is computed by its own domain.

        Args:
            domains: The domain of every sample of the batch; None: the backbone alone. All skip
                the same branches.
            device: Where the network computes.
        """
        if len(set(domains)) < 2:  # there is nothing to tell apart
            return self.call(domains[0] if domains else None)
        positions = {
            domain: torch.tensor([i for i, d in enumerate(domains) if d is domain], device=device)
            for domain in dict.fromkeys(domains)
        }
        named = [domain for domain in positions if domain is not None]
        own = [positions[domain] for domain in named]
        adapters = {
            host: MixedAdapters(host, [d.adapter(host) for d in named], own, len(domains))
            for host in self.hosts
        }
        skipped = frozenset(named[0].skipped)
        if self.head is None:
            return Call(adapters, skipped=skipped)
        heads = [cast(nn.Module, self.head_of(domain)) for domain in positions]
        return Call(adapters, MixedHeads(heads, list(positions.values())), skipped=skipped)


def _slot_in(place: nn.Module) -> HeadSlot:
    """The slot, which is the one layer of a graph where the network around it stays Python."""
    return next(module for module in place.modules() if isinstance(module, HeadSlot))


def connect_(backbone: nn.Module, calls: Calls) -> None:
    """Let every place of a backbone ask `calls` for what runs."""
    for module in backbone.modules():
        if isinstance(module, Place):
            module.calls = calls
