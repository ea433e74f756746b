"""Domains as files for runtimes without Python."""

from __future__ import annotations

from typing import Any

from lightning_da3.model.batches import laid_out
from lightning_da3.model.running import Running
from lightning_da3.nn.call import Noise


class Exports(Running):
    """A backbone with domains that are exported. Everything is an attribute of `DA3Model`."""

    def run_domain(self, name: str | None, noise: Noise | None, *args: Any) -> tuple[Any, Any]:
        """One pass for a domain, whichever is active.

        Args:
            name: One of `domains`; None: the backbone alone.
            noise: On its gates, or None.
            args: As `forward` takes them.

        Returns:
            The output, and how much of every host was executed, with the host's name.
        """
        call = self._slots.call(None if name is None else self.domain(name))
        output, ledger = self._run(call.with_noise(noise), *args)
        return laid_out(output, (args, {})), ledger
