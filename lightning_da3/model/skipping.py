"""Domains that skip residual branches: for them the network is a smaller one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_da3.model.branches import closed_hosts, ordered_branches
from lightning_da3.model.multi_domain import MultiDomain


class SkipsBranches(MultiDomain):
    """A backbone with domains, of which each may skip residual branches of it."""

    def skip(self, name: str, branches: Sequence[str]) -> None:
        """Let a domain skip residual branches, ``x + f(x)`` becomes ``x``, for every sample.

        For this domain the network is a smaller one from now on: in inference, in training, in
        exported files, and in what the network's other methods compute. Adapters of hosts inside
        of these branches do not act, and stay as they are. A domain that has learned already
        computes something else afterwards: train it on. Skip before DistributedDataParallel wraps
        the model, which expects a gradient of all that required one then.

        Args:
            name: One of `domains`.
            branches: Names of ``plan.branches``; none: the domain computes the whole network.

        Raises:
            DomainError: There is no such domain.
            ConfigError: There is no such branch; what can be skipped is named.
            DA3Error: The model does not know its network any more.
        """
        domain = self.domain(name)
        ordered = ordered_branches(self._whole, branches)
        if ordered == domain.skipped:
            return
        self._make_smaller(frozenset(ordered))
        self._let_skip(name, ordered)
        self._forget_smaller()

    def skipped(self, name: str) -> tuple[str, ...]:
        """The residual branches that a domain skips.

        Args:
            name: One of `domains`.

        Raises:
            DomainError: There is no such domain.
        """
        return self.domain(name).skipped

    def _let_skip(self, name: str, branches: tuple[str, ...]) -> None:
        domain = self.domain(name)
        trains = any(p.requires_grad for p in domain.parameters())
        domain.skipped, domain.closed = branches, closed_hosts(self._whole, branches)
        domain.requires_grad_(trains)
        if self._active == name:
            self.calls.everywhere = self._slots.call(domain)

    def _forget_smaller(self) -> None:
        """Forget networks that no domain computes with."""

    # --- state ------------------------------------------------------------------------------------

    def get_extra_state(self) -> dict[str, Any]:
        """What a state dict must say beside its tensors; plain types only."""
        skipped = {n: list(s) for n in self.domains if (s := self.domain(n).skipped)}
        return {**super().get_extra_state(), **({"skipped": skipped} if skipped else {})}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take what `complete_state` did not use before the tensors were loaded."""
        super().set_extra_state(state)
        for name in state["num_classes"]:
            self.skip(name, state.get("skipped", {}).get(name, ()))
