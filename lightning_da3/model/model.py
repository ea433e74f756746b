"""DA3Model: a frozen backbone and any number of domains. No Lightning."""

from __future__ import annotations

import html
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_da3.budget.microbatches import samples_in
from lightning_da3.choices import is_finite
from lightning_da3.errors import ConfigError, InputError
from lightning_da3.formatting import shown
from lightning_da3.model.batches import check_input
from lightning_da3.model.choosing import ChoosesBranches
from lightning_da3.model.exports import Exports
from lightning_da3.model.mixed import (
    NEAREST,
    Domains,
    alike,
    by_sample,
    check_domains,
    check_outside,
    chosen,
)
from lightning_da3.model.modes import set_mode_
from lightning_da3.model.recognizing import Recognizes
from lightning_da3.model.status import Status, StepFigures, percentage
from lightning_da3.model.views import has_name, view_of
from lightning_da3.nn.head import class_axis, classes_of


class DA3Model(Exports, ChoosesBranches, Recognizes):
    """A network whose backbone is frozen and held in eval, with domains to switch between.

    Made by `lightning_da3.convert`. Calls like the network it was made from. With no domain active
    it computes what that network computes in eval.

    Args:
        backbone: The rewritten network.
        plan: The plan that it was rewritten by.
        config: The user's choices.
        fingerprint: Identifies the weights of the user's backbone.
        architecture: Identifies its layers (see `lightning_da3.model.identity.architecture`).
        original: The network that it was made from, for the costs of fine-tuning.

    Attributes:
        bank: The domains by name.
        budget_policy: Splits training batches so that a step stays within a budget.
        progress: How far training is, in [0, 1].
        gate_loss_scale: What the loss is multiplied by before its backward, such as 1/k where the
            gradients of k batches add up, so that the gates' loss is as well. None: measured by
            the gradients that come in (`lightning_da3.nn.gate.with_loss`). A Trainer that steps
            automatically says it.
        gates_over_ranks: Every training batch is a rank's part of a global one.
    """

    # --- computing: forward, then what it calls, in order -----------------------------------------

    def forward(self, *args: Any, domains: Domains | None = None, **kwargs: Any) -> Any:
        """What the network returned before, for the active domain.

        While a domain trains, the output carries the gates' budget loss into the backward pass.

        Args:
            args: As the network takes them.
            domains: For inference, the domain of every sample along axis 0, None for the backbone
                alone; or ``"nearest"``, what `nearest_domains` says. All samples share one pass
                through the backbone, or all that skip the same branches; the active domain plays no
                part and stays active.
            kwargs: As the network takes them.

        Returns:
            The network's output. With `domains` a list with every sample's own, without axis 0:
            heads may have different numbers of classes.

        Raises:
            InputError: The batch does not fit the network; or `domains` does not fit the batch, or
                is given while training, or samples lie apart along other axes than 0 somewhere.
            DomainError: There is no such domain.
        """
        check_input(args, self.plan)
        if domains is not None:
            return self._run_mixed(domains, args, kwargs)
        return self._computed(self._run_within_budget, args, kwargs)

    def _run_mixed(self, domains: Domains, args: Any, kwargs: Any) -> list[Any]:
        """The outputs of samples of several domains, from one pass."""
        if self.training and torch.is_grad_enabled():
            raise InputError(
                "`domains` is for inference: call `eval()`, or compute inside `torch.no_grad()`. "
                "To train several domains in one run, see `DomainLoader`."
            )
        batch = (*args, *kwargs.values())
        count = samples_in(batch)
        if isinstance(domains, str) and domains == NEAREST:
            domains = self.nearest_domains(*args, **kwargs)
        check_domains(domains, count)
        own = [None if name is None else self.domain(name) for name in domains]
        check_outside(own, self.holder)
        groups = alike(own)
        if len(groups) > 1:
            return self._run_groups(domains, groups, args, kwargs)
        slots = self._slots
        with torch.no_grad():
            call = slots.mixed(own, self._device)
            output, ledger = self._run(call, *args, **kwargs)
        self._executed(ledger, call)
        heads = [head for domain in own if (head := slots.head_of(domain)) is not None]
        axis = class_axis(heads[0]) if heads else -1
        listed = isinstance(batch[0], (list, tuple))
        return by_sample(output, count, [classes_of(h) for h in heads], axis, listed=listed)

    def _run_groups(
        self, domains: Sequence[str | None], groups: Sequence[Sequence[int]], args: Any, kwargs: Any
    ) -> list[Any]:
        """The outputs of samples that skip different branches, from one pass for each group."""
        found: dict[int, Any] = {}
        shares: list[Tensor | None] = []
        for own in groups:
            some, named = chosen((args, kwargs), own, len(domains))
            outputs = self._run_mixed([domains[i] for i in own], some, named)
            found.update(zip(own, outputs, strict=True))
            shares.append(self.executed_flops_fraction)
        whole, weights = torch.tensor(1.0), [len(own) / len(domains) for own in groups]
        mean = [w * (whole if s is None else s) for s, w in zip(shares, weights, strict=True)]
        here = self.calls.here  # groups differ in what they skip, so that some do
        here.executed, here.whole = torch.stack(mean).sum(), False
        return [found[i] for i in range(len(domains))]

    @torch.no_grad()
    def gate_maps(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Where every host of the active domain runs for this input.

        Args:
            args: As `forward` takes them.
            kwargs: As `forward` takes them.

        Returns:
            Zeros and ones of shape (N, 1, *grid) by host name, in the order of the plan; nothing
            without gates.
        """
        maps = {
            name: executed.gate
            for name, executed in self._run(self.calls.resting, *args, **kwargs)[1]
        }
        return {host.name: maps[host.name] for host in self.plan.hosts if host.name in maps}

    # --- modes ------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> DA3Model:
        """Domains follow `mode`; the backbone is held in eval whatever it says.

        Frozen layers compute the same either way and show `mode`; only layers that could tell the
        difference show eval, so that Lightning warns of them and not of every other layer. What
        stays Python follows `mode` (a detector returns its losses only in train mode).
        """
        super().train(mode)
        set_mode_(self.backbone, self.plan, mode)
        self._let_follow()
        return self

    # --- the user's network -----------------------------------------------------------------------

    @property
    def network(self) -> Any:
        """The user's network as its own class shows it: attributes, submodules and methods.

        Parameters are those that the converted network computes with, and the active domain's.
        Methods that are called with tensors, and submodules, compute as `forward` does. What the
        model itself has no attribute for is found here: ``model.forward_features(x)`` is
        ``model.network.forward_features(x)``. It is to be read.
        """
        if self.methods.view is None:
            self.methods.view = view_of(self)
        return self.methods.view

    if not TYPE_CHECKING:  # or type checkers would take every misspelt name

        def __getattr__(self, name: str) -> Any:
            """What the user's network has of this name."""
            try:
                return super().__getattr__(name)
            except AttributeError:
                original = vars(self).get("original")
                network = None if original is None else original.network
                if name.startswith("__") or network is None or not has_name(network, name):
                    raise
            return getattr(self.network, name)

    def __getitem__(self, index: Any) -> Any:
        """What the user's network has there, such as a layer of an `nn.Sequential`."""
        return self.network[index]

    def __len__(self) -> int:
        """The length of the user's network, if it has one."""
        return len(self.network)

    def __iter__(self) -> Iterator[Any]:
        """The parts of the user's network, if it can be iterated over."""
        return iter(self.network)

    def __bool__(self) -> bool:
        """True, whatever its length."""
        return True

    # --- what it is -------------------------------------------------------------------------------

    def status(
        self,
        *,
        name: str = "",
        domains: Iterable[str] | None = None,
        outside: Mapping[str, int] | None = None,
        step: StepFigures | None = None,
    ) -> Status:
        """What the model is and trains; ``print(model.status())`` says it in a few lines.

        Args:
            name: Where the network is in what holds it, such as ``net``.
            domains: The names of the domains that train; by default the active one.
            outside: Numbers of parameters outside the network that train with the domain, by name.
            step: What a training step takes, if it is known.

        Raises:
            DomainError: There is no such domain.
        """
        active = [] if self.active_domain is None else [self.active_domain]
        shown = {d: self.domain(d) for d in (active if domains is None else domains)}
        trained = sum(_size(domain.acting) for domain in shown.values())
        plan, hosts = self.plan, self.plan.hosts
        return Status(
            name=name,
            network=plan.network,
            head=plan.head,
            domains={d: domain.num_classes for d, domain in shown.items()},
            others=tuple(d for d in self.domains if d not in shown),
            hosts=len(hosts),
            first_host=hosts[0].name if hosts else "",
            trained=trained + sum((outside or {}).values()),
            parameters=_size(self.backbone) + trained + sum((outside or {}).values()),
            outside=dict(outside or {}),
            python=len(plan.python) + len(plan.functions),
            again=len(plan.regions),
            step=step,
            shares={
                d: self._whole.executed_share(domain.skipped)
                for d, domain in shown.items()
                if domain.skipped
            },
        )

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train, in one line, as `peft` does."""
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        count = sum(p.numel() for p in self.parameters())
        sys.stdout.write(
            f"trainable params: {trained:,d} || all params: {count:,d} || "
            f"trainable%: {percentage(trained, count):.4f}\n"
        )

    def set_progress(self, progress: float) -> None:
        """Say how far training is, in [0, 1]: closes the gates slowly and ends their noise.

        Raises:
            ConfigError: It is no such number.
        """
        if not (is_finite(progress) and 0.0 <= progress <= 1.0):
            raise ConfigError(
                "`progress` must be a number in [0, 1], such as step / steps, got "
                f"{shown(progress)}."
            )
        self.progress = progress

    def __dir__(self) -> list[str]:
        """Public names: the model's own, and those of the user's network."""
        network = self.original.network
        theirs = [] if network is None else dir(network)
        names = {*super().__dir__(), *theirs}  # type: ignore[no-untyped-call]
        return sorted(name for name in names if not name.startswith("_"))

    def extra_repr(self) -> str:
        """What the model is, and its domains."""
        plan, weights = self.plan, self.config.memory.weights
        said = [plan.network, f"{len(plan.hosts)} hosts", f"head={plan.head!r}"]
        said += [f"domains={self.domains}", f"active_domain={self.active_domain!r}"]
        if weights != "same":
            said.append(f"weights={weights!r}: the backbone is rounded once")
        return ", ".join(said)

    def __repr__(self) -> str:
        """One line; ``print(model.backbone)`` shows every layer, ``print(model.plan)`` the plan."""
        return f"{type(self).__name__}({self.extra_repr()})"

    def _repr_html_(self) -> str:
        """The status and the plan, for notebooks."""
        return f"<pre>{html.escape(str(self.status()))}</pre>{self.plan._repr_html_()}"


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
