"""A backbone and its domains, of which one at most is active: the verbs and the state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_da3.config import DA3Config
from lightning_da3.errors import ConfigError, DomainError
from lightning_da3.files.names import check_name
from lightning_da3.formatting import shown
from lightning_da3.model.domain import Bank, Domain, new_domain
from lightning_da3.model.holder import Holder
from lightning_da3.model.nearest import new_statistics
from lightning_da3.model.outside import Outside, take_back_, tensors_of, with_room
from lightning_da3.model.pending import rest_
from lightning_da3.model.slots import Slots, connect_
from lightning_da3.model.state import OUTSIDE, SHARED, complete_state
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
        follows: It is a momentum teacher: a copy whose domains require no gradient, active or not.
        shared: What trains beside the network and no domain owns; None: nothing.
        holder: The module that this is in, where what trains beside it is switched as well; None:
            no module was attached.
    """

    former: Mapping[str, str] = MappingProxyType({})
    follows = False

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
        self.shared: Outside | None = None
        self.holder: Holder | None = None
        self.plan, self.config = plan, config
        self.fingerprint, self.architecture = fingerprint, architecture
        self._whole = plan  # whatever `settle_` makes of the other
        self._active: str | None = None
        self._may_wait = False  # for its backward: a loss of the active domain
        self._was_set = False  # somebody said which domain is to be active, or that none is
        self.calls = Calls()
        connect_(backbone, self.calls)
        self.register_load_state_dict_pre_hook(complete_state)  # type: ignore[no-untyped-call]
        self.register_state_dict_pre_hook(MultiDomain.refresh)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        """Alone: a copy of the module that holds it says so itself."""
        self.refresh()
        return {**vars(self), "holder": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for outside in (self.shared, *(self.domain(name).outside for name in self.domains)):
            take_back_(outside)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """PyTorch's own, of the network and its domains.

        Without what trains beside it: that is of the module that holds it, which lists it.
        """
        for name, parameter in super().named_parameters(prefix, recurse, remove_duplicate):
            inside = name[len(prefix) + 1 :] if prefix else name
            if not inside.startswith(SHARED) and inside.split(".")[2:3] != [OUTSIDE[:-1]]:
                yield name, parameter

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
        domain.outside = None if self.holder is None else self.holder.fresh()
        self.bank[name] = domain.requires_grad_(False).train(self.training)

    def set_domain(self, name: str | None) -> None:
        """Activate a domain by changing references; None leaves the backbone alone.

        Parameters of the active domain require a gradient, all others do not. Calls that run in
        other threads end with the domain that they began with. What trains with the domain in the
        module that a Trainer attached is switched as well, for all threads. A loss of before still
        brings its own domain gradients; PyTorch refuses it, if it passed a norm with statistics
        beside the network.

        Args:
            name: One of `domains`, or None.

        Raises:
            DomainError: There is no such domain, or the module has no place for what is its own.
        """
        domain = None if name is None else self.domain(name)
        holder = self.holder
        if holder is not None:
            if lacking := holder.lacking(None if domain is None else domain.outside):
                raise DomainError(
                    f"Domain {name!r} has {lacking} outside of the network, for which "
                    f"{type(holder.root).__name__} has no place. Make it with the parts that the "
                    "domain was learned with."
                )
            holder.take_back()
        if domain is not None:
            self._make_smaller(frozenset(domain.skipped))  # now: a compiler could not make it
            domain.requires_grad_(not self.follows)
            domain.loss_unit.on(self._device)  # now: a compiler could not make it
        before, self._active, self._was_set = self._active, name, True
        self.calls.everywhere, self.calls.here.resting = self._slots.call(domain), None
        if before is not None and before != name:
            earlier = self.domain(before)
            if self._may_wait:
                rest_(earlier.parameters(), lambda: self._is_active(earlier))
            else:
                earlier.requires_grad_(False)
            self._may_wait = False
        if holder is not None:
            holder.put(domain)

    def _is_active(self, domain: Domain) -> bool:
        return self._active is not None and self.bank[self._active] is domain

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

    def refresh(self, *_: object) -> None:
        """Take over statistics of what trains beside the network, before they are read here."""
        if self.holder is not None:
            self.holder.refresh()

    def expected_outside(
        self, name: str | None, outside: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """What may be loaded of what trains beside the network with a domain.

        Args:
            name: The domain; None: a new one.
            outside: What there is to load, by name.

        Returns:
            Of these tensors those that have a place, with its shape: all, if no module is attached.
        """
        if self.holder is None:
            return {f"{OUTSIDE}{key}": value for key, value in outside.items()}
        places = tensors_of(self.shared)
        if name is not None and name in self.bank:
            places |= tensors_of(self.domain(name).outside)
        return {f"{OUTSIDE}{key}": value for key, value in places.items() if key in outside}

    def expect_outside(self, name: str, outside: Mapping[str, Tensor]) -> None:
        """Make room for what is about to be loaded of what trains beside the network."""
        domain = self.domain(name)
        if set(outside) <= set(tensors_of(domain.outside)):
            return
        with nullcontext() if self.holder is None else self.holder.resting():
            domain.outside = with_room(domain.outside, outside, self.shared)

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
            **({"follows": True} if self.follows else {}),
            **({"loss_units": units} if units else {}),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take what `complete_state` did not use before the tensors were loaded."""
        for name, unit in state.get("loss_units", {}).items():
            self.domain(name).loss_unit.value = torch.tensor(unit)

    # --- parts ------------------------------------------------------------------------------------

    def _make_smaller(self, skipped: frozenset[str]) -> None:
        """Make the network without these branches, unless it is there."""

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
        stored, parameters = self.config.memory.stored_dtype, self.backbone.parameters()
        first = next(parameters)
        return next((p for p in chain([first], parameters) if p.dtype != stored), first)

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
