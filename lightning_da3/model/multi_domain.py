"""A backbone and its domains, of which one at most is active: the verbs, files and state."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_da3.config import DA3Config
from lightning_da3.errors import CheckpointError, ConfigError, DA3Error, DomainError
from lightning_da3.files.domain_file import domain_file_bytes, read_domain, write_domain
from lightning_da3.files.names import check_name
from lightning_da3.formatting import shown
from lightning_da3.model.domain import Bank, Domain, new_domain
from lightning_da3.model.identity import check_identity, identity
from lightning_da3.model.nearest import new_statistics
from lightning_da3.model.slots import Slots, connect_
from lightning_da3.model.state import HAS_STATISTICS, check_tensors, complete_state
from lightning_da3.nn.call import Call, Calls
from lightning_da3.planning.plan import Plan


class MultiDomain(nn.Module):
    """A rewritten backbone, and a bank of domains to switch between.

    Args:
        backbone: The rewritten network.
        plan: The plan that it was rewritten by.
        config: The user's choices.
        fingerprint: Identifies the weights of the user's backbone.
        architecture: Identifies its layers (`lightning_da3.model.identity.architecture`).

    Attributes:
        bank: The domains by name.
        calls: What new calls compute with, and those that run.
        former: What earlier versions called the backbone, where they called it otherwise
            (`lightning_da3.model.identity.former_identity`).
    """

    former: Mapping[str, str] = MappingProxyType({})

    def __init__(
        self,
        backbone: nn.Module,
        plan: Plan,
        config: DA3Config,
        fingerprint: str,
        architecture: str,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.bank = Bank()
        self.plan, self.config = plan, config
        self.fingerprint, self.architecture = fingerprint, architecture
        self._active: str | None = None
        self._was_set = False  # somebody said which domain is to be active, or that none is
        self.calls = Calls()
        connect_(backbone, self.calls)
        self.register_load_state_dict_pre_hook(complete_state)  # type: ignore[no-untyped-call]

    @property
    def domains(self) -> list[str]:
        """The names of the domains, in the order in which they were added."""
        return list(self.bank)

    @property
    def active_domain(self) -> str | None:
        """The domain that `forward` computes, or None for the backbone alone."""
        return None if self.calls.here.resting else self._active

    def domain(self, name: str) -> Domain:
        """The modules of one domain.

        Raises:
            DomainError: There is no such domain.
        """
        if not isinstance(name, str) or name not in self.bank:
            raise DomainError(
                f"There is no domain {shown(name)}. There are {self.domains}; "
                "`add_domain(name, num_classes)` makes a new one."
            )
        return cast(Domain, self.bank[name])

    def add_domain(
        self,
        name: str,
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        """Make a fresh domain, which adds exactly zero to the backbone's features.

        Args:
            name: Letters, digits, ``-`` and ``_``, at most 100.
            num_classes: The number of scores of its head, at least 1. None exactly if the config
                has no head.
            class_names: What the scores stand for, one each; saved with the domain.

        Raises:
            DomainError: The name is taken or ill-formed.
            ConfigError: `num_classes` is missing or wrong, or `class_names` are not as many.
        """
        check_name(name)
        if name in self.bank:
            raise DomainError(
                f"There is a domain {name!r} already. Choose another name, or make room with "
                f"`delete_domain({name!r})`."
            )
        domain = self._new_domain(num_classes, class_names, self._device)
        self.bank[name] = domain.requires_grad_(False).train(self.training)

    def set_domain(self, name: str | None) -> None:
        """Activate a domain by changing references; None leaves the backbone alone.

        Parameters of the active domain require a gradient, all others do not. Calls that run in
        other threads end with the domain that they began with.

        Args:
            name: One of `domains`, or None.

        Raises:
            DomainError: There is no such domain.
        """
        domain = None if name is None else self.domain(name)
        if domain is not None:
            domain.requires_grad_(True)
            domain.loss_unit.on(self._device)  # now: a compiler could not make it
        before, self._active, self._was_set = self._active, name, True
        self.calls.everywhere, self.calls.here.resting = self._slots.call(domain), None
        if before is not None and before != name:
            self.domain(before).requires_grad_(False)

    def delete_domain(self, name: str) -> None:
        """Remove a domain and its parameters; if it was active, the backbone alone remains.

        Raises:
            DomainError: There is no such domain.
        """
        self.domain(name)
        if self._active == name:
            self.set_domain(None)
        del self.bank[name]

    @contextmanager
    def disable_adapters(self) -> Iterator[None]:
        """The backbone alone inside a ``with`` block, for calls of this thread.

        Afterwards the same domain as before is active. One that is set inside is active until then.
        """
        here, before, alone = self.calls.here, self._active, Call()
        outside, here.resting = here.resting, alone
        try:
            yield
        finally:
            if here.resting is not alone:  # a domain was set inside
                self.set_domain(before)
            here.resting = outside

    # --- files ------------------------------------------------------------------------------------

    def save_domain(self, name: str, path: str | os.PathLike[str], **metadata: Any) -> None:
        """Write one domain to a safetensors file, whole or not at all.

        Args:
            name: One of `domains`.
            path: The file; its folder must exist.
            metadata: Anything JSON holds that should lie with it, such as metrics.

        Raises:
            DomainError: There is no such domain.
            CheckpointError: It cannot be written, or holds NaN; a file that was there stays.
        """
        write_domain(path, self.domain(name).state_dict(), self._about(name, metadata))

    def domain_file_bytes(self, name: str) -> int:
        """The size of the file that `save_domain` makes of one domain, in bytes.

        Raises:
            DomainError: There is no such domain.
        """
        return domain_file_bytes(self.domain(name).state_dict(), self._about(name, {}))

    def _about(self, name: str, metadata: dict[str, Any]) -> dict[str, Any]:
        """What a domain's file says of it."""
        domain = self.domain(name)
        about: dict[str, Any] = {
            "domain": name,
            "num_classes": domain.num_classes,
            "extra": metadata,
        }
        if domain.class_names is not None:
            about["class_names"] = domain.class_names
        return {**about, **identity(self)}

    def load_domain(self, path: str | os.PathLike[str], name: str | None = None) -> str:
        """Add the domain that `save_domain` wrote.

        Args:
            path: The file.
            name: What to call it here; by default as it was called.

        Returns:
            Its name.

        Raises:
            CheckpointError: The file is damaged or foreign, or was made for another backbone or
                another config; the model is left as it was.
            DomainError: There is a domain of that name already.
        """
        file = read_domain(path)
        check_identity(self, file.metadata, str(path))
        about, has_statistics = file.metadata, HAS_STATISTICS in file.tensors
        classes = (about["num_classes"], about.get("class_names"))
        try:
            if name is None:  # a name that was good enough once can be replaced here
                check_name(about["domain"])
            expected = self.expected_tensors(*classes, statistics=has_statistics)
            check_tensors(file.tensors, expected)
        except DA3Error as error:
            raise CheckpointError(
                f"The domain file {str(path)!r} does not fit this model: {error}"
            ) from error
        name = about["domain"] if name is None else name
        self.add_domain(name, *classes)
        if has_statistics:
            self.expect_statistics(name)
        self.domain(name).load_state_dict(file.tensors)
        return name

    # --- state ------------------------------------------------------------------------------------

    def expected_tensors(
        self, num_classes: int | None, class_names: Any, *, statistics: bool
    ) -> dict[str, Tensor]:
        """What a domain holds, without values: nothing is allocated for what nobody has yet.

        Args:
            num_classes: As for `add_domain`, but not to be trusted.
            class_names: Likewise.
            statistics: Whether it has some.

        Raises:
            ConfigError: No domain could be so.
        """
        try:
            domain = self._new_domain(num_classes, class_names, torch.device("meta"))
        except (RuntimeError, TypeError, OverflowError) as error:  # PyTorch's own, of absurd sizes
            raise ConfigError(f"There cannot be {num_classes!r} classes: {error}") from error
        if statistics:
            domain.statistics = new_statistics(self.plan, "meta")
        return dict(domain.state_dict())

    def expect_statistics(self, name: str) -> None:
        """Make room for statistics that are about to be loaded."""
        if self.domain(name).statistics is None:
            self.domain(name).statistics = new_statistics(self.plan, self._device)

    def get_extra_state(self) -> dict[str, Any]:
        """What a state dict must say beside its tensors; plain types only."""
        domains = {name: self.domain(name) for name in self.domains}
        units = {name: domain.loss_unit.number for name, domain in domains.items()}
        units = {name: unit for name, unit in units.items() if unit}  # of those that were measured
        return {
            "backbone": self.fingerprint,
            "config": self.config.to_dict(),
            "num_classes": {name: domain.num_classes for name, domain in domains.items()},
            "class_names": {name: domain.class_names for name, domain in domains.items()},
            "active": self._active,
            **({"loss_units": units} if units else {}),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take what `complete_state` did not use before the tensors were loaded."""
        for name, unit in state.get("loss_units", {}).items():
            self.domain(name).loss_unit.value = torch.tensor(unit)

    # --- parts ------------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """The type of what the network computes, and of new domains."""
        return self._computing.dtype

    @property
    def _device(self) -> torch.device:
        return self._computing.device

    @property
    def _computing(self) -> nn.Parameter:
        """A weight in the type that the network computes in, which some are not stored in."""
        parameters = list(self.backbone.parameters())
        stored = self.config.memory.stored_dtype
        return next((p for p in parameters if p.dtype != stored), parameters[0])

    @property
    def _slots(self) -> Slots:
        return Slots(self.backbone, self.plan)

    def _new_domain(
        self,
        num_classes: int | None,
        class_names: Sequence[str] | None,
        device: torch.device,
    ) -> Domain:
        slot = self._slots.head
        head = None if slot is None else slot.original
        place: dict[str, Any] = {"device": device, "dtype": self.dtype}
        return new_domain(self.plan, self.config, head, num_classes, class_names, **place)
