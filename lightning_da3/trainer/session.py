"""What one run of a Trainer learns, and the network that learns it."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_da3.config import DA3Config
from lightning_da3.errors import ConfigError
from lightning_da3.formatting import shown
from lightning_da3.model.model import DA3Model
from lightning_da3.model.outside import tensors_of
from lightning_da3.trainer.attaching import attach_
from lightning_da3.trainer.averaging import average_domains_only, copy_again
from lightning_da3.trainer.frozen import FrozenTensors
from lightning_da3.trainer.naming import DomainNames
from lightning_da3.trainer.optimizers import (
    check_learns,
    drop_frozen_,
    join_domains_,
    not_optimized,
    take_over_,
)
from lightning_da3.trainer.precision import precision_of
from lightning_da3.trainer.teachers import follow_

OUTSIDE = ("domain", "shared", "frozen")


class TrainingSession:
    """The domains that a Trainer learns, and their network.

    Args:
        domains: Number of classes by name, at least one. With several, batches say which domain
            they are of: ``{name: batch}``.
        config: The choices for the conversion.
        backbone: Dotted name of the network inside the LightningModule, or None to look for it.
        outside: What becomes of what trains beside the network, as for `DA3Callback`.

    Attributes:
        model: The converted network, or None before it is found.
        names: Of what is logged, while several domains take turns.

    Raises:
        ConfigError: `outside` is none of the three.
    """

    def __init__(
        self,
        domains: Mapping[str, int | None],
        config: DA3Config,
        backbone: str | None,
        outside: str = "domain",
    ) -> None:
        if outside not in OUTSIDE:
            raise ConfigError(f"`outside` must be one of {OUTSIDE}, got {shown(outside)}.")
        self.domains, self.config, self.backbone = dict(domains), config, backbone
        self.outside = outside
        self.names = DomainNames()
        self._module: Any = None
        self._said = False
        self._copies: list[DA3Model] = []  # in averages of the LightningModule
        self._former: list[weakref.ref[nn.Parameter]] = []  # before the conversion
        self.model: DA3Model | None = None
        self._frozen: FrozenTensors | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the network: it belongs to the LightningModule."""
        return {**vars(self), "model": None, "_copies": [], "_module": None, "_former": []}

    @property
    def network(self) -> DA3Model:
        """The converted network, where it must be there."""
        assert self.model is not None
        return self.model

    def attach(self, pl_module: Any, trainer: Any, *, copied: bool = True) -> None:
        """Convert the network, unless it is, and activate a domain. Any number of times.

        Args:
            pl_module: The LightningModule.
            trainer: The network is converted in the precision of its steps.
            copied: Its callbacks may have copied the module, and copy it again.
        """
        before = {name: weakref.ref(p) for name, p in pl_module.named_parameters()}
        self._module, precision = pl_module, precision_of(trainer)
        about = (self.backbone, self.config, self.domains, self.outside)
        self.model = attach_(pl_module, *about, precision)
        after = dict(pl_module.named_parameters())
        if [*after] != [*before]:
            if copied:
                copy_again(trainer, pl_module)
            self._former = [ref for name, ref in before.items() if after.get(name) is not ref()]
        if not self._said:
            self._said = True
            self._tell(self.network)

    def _tell(self, network: DA3Model) -> None:
        """Say, once, what would be silent otherwise."""
        if network.holder is not None and self.outside == "shared":
            rank_zero_warn(
                f"{sorted(tensors_of(network.shared))}, outside of the network, train with "
                f"every domain in turn: what {list(self.domains)} learn changes what all other "
                'domains compute. DA3Callback(..., outside="domain") keeps them apart.'
            )
        if network.plan.head is None and network.config.head is not None and not network.holder:
            rank_zero_info(
                f"DA3: no single layer gives the output of {network.plan.network}, so that its own "
                "output layers are kept, frozen; adapters train. DA3Config(head='name') gives "
                "every domain its own of one layer, DA3Config(head=None) says that this is meant."
            )

    @property
    def outside_parameters(self) -> dict[str, int]:
        """The number of parameters beside the network that the active domain trains, by part."""
        network = self.network
        numbers: dict[str, int] = {}
        if network.active_domain is None or self.outside == "frozen":
            return numbers
        own = network.domain(network.active_domain).outside
        for name, tensor in tensors_of(own if own is not None else network.shared).items():
            if isinstance(tensor, nn.Parameter):
                part = name.split(".")[0]
                numbers[part] = numbers.get(part, 0) + tensor.numel()
        return numbers

    def activate(self, domain: str | None) -> None:
        """Activate a domain, in averages of the network as well: their parameters are in turn."""
        for model in (self.network, *self._copies):
            model.set_domain(domain)
        if self._module is not None:
            follow_(self._module, self.network, domain)

    def skip(self, domain: str, branches: Sequence[str]) -> None:
        """Let a domain skip branches, in averages of the network and teachers as well."""
        for model in (self.network, *self._copies):
            model.skip(domain, branches)
        if self._module is not None:
            follow_(self._module, self.network, self.network.active_domain)

    def turn_to(self, domain: str) -> None:
        """A batch of a domain comes next, of several domains that take turns."""
        self.activate(domain)
        self.names.step(domain)

    def open_domains(self) -> None:
        """Let every domain require gradients: DDP and optimizers take what does."""
        self.network.set_domain(next(iter(self.domains)))  # their order is to be the same each time
        for name in self.domains:
            self.network.domain(name).held_open = True
            self.network.domain(name).requires_grad_(True)

    @property
    def may_leave_out(self) -> bool:
        """Whether some of what requires a gradient when a run begins may get none in a step."""
        gate = self.network.config.gate
        skips = any(self.network.skipped(name) for name in self.domains)
        return len(self.domains) > 1 or skips or (gate is not None and gate.by == "domain")

    def close_domains(self) -> None:
        """Let the active domain alone require gradients."""
        for name in self.domains:
            if self.model is not None and name in self.model.domains:
                self.model.domain(name).held_open = False
                self.model.domain(name).requires_grad_(name == self.model.active_domain)

    def begin_fit(self, trainer: Any) -> None:
        """Take what is frozen out of the Trainer's optimizers and averages.

        Raises:
            ConfigError: No optimizer holds a parameter of a domain.
        """
        self._copies = average_domains_only(trainer)
        if self.network.holder is not None:
            places = self.network.holder.places(self.domains)
            join_domains_(trainer.optimizers, places)
            if lacking := not_optimized(trainer.optimizers, places):
                rank_zero_warn(
                    f"No optimizer holds {lacking}, outside of the network: they stay as they are. "
                    "Give it `self.parameters()` in configure_optimizers, or say "
                    'DA3Callback(..., outside="frozen").'
                )
        learned = {
            f"{domain}.{part}.{name}": parameter
            for domain in self.domains
            for part in ("adapters", "head")
            if (layers := getattr(self.network.domain(domain), part)) is not None
            for name, parameter in layers.named_parameters()
        }
        former = [parameter for ref in self._former if (parameter := ref()) is not None]
        take_over_(trainer.optimizers, former, learned)
        drop_frozen_(trainer.optimizers)
        check_learns(trainer.optimizers, learned.values(), str(list(self.domains)))
        self.close_domains()
        self._frozen = FrozenTensors(self.network, self.domains)

    def end_fit(self) -> None:
        """Refuse that anything but the domains changed since `begin_fit`.

        Raises:
            DA3Error: Something did.
        """
        if self._frozen is not None:
            self._frozen.check(self.network)
