"""DA3Model: a frozen backbone and any number of domains. No files, no Lightning."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from lightning_da3.budget.microbatches import batch_size, cut, run_microbatches, samples_in
from lightning_da3.budget.policy import BudgetPolicy
from lightning_da3.config import DA3Config
from lightning_da3.costs import ModelPlan, Original
from lightning_da3.eager import KeepsLess
from lightning_da3.errors import CheckpointError, ConfigError, DA3Error, DomainError, InputError
from lightning_da3.files.domain_file import domain_file_bytes, read_domain, write_domain
from lightning_da3.model.mixed import NEAREST, Domains, by_sample, check_domains
from lightning_da3.model.state import (
    HAS_STATISTICS,
    check_identity,
    check_input,
    check_tensors,
    complete_state,
    identity,
)
from lightning_da3.nn.adapter import Adapter, HostInput, MixedAdapters
from lightning_da3.nn.gate import (
    Executed,
    Recorder,
    annealed_target,
    budget_loss,
    executed_fraction,
    with_loss,
)
from lightning_da3.nn.head import HeadSlot, MixedHeads, class_axis, classes_of, new_head
from lightning_da3.nn.statistics import Statistics
from lightning_da3.ops.bits import lies_channels_last
from lightning_da3.passes.hosts import INPUTS, host_key
from lightning_da3.planning.plan import HostPlan, Plan

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
NOISE_UNTIL = 0.8  # of training; the gates settle without noise


class Domain(nn.Module):
    """What one domain owns: an adapter for every host, its head, and statistics once it has some.

    Args:
        adapters: By host key, in the order of the plan.
        head: Its classifier, or None if it uses the backbone's own.
        num_classes: Scores that the head gives.
        class_names: One for every score, or None.
    """

    def __init__(
        self,
        adapters: Mapping[str, Adapter],
        head: nn.Module | None,
        num_classes: int | None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.statistics: Statistics | None = None  # of the backbone's features of its samples
        self.adapters = nn.ModuleDict(dict(adapters))
        self.head = head
        self.num_classes = num_classes
        self.class_names = checked_class_names(class_names, num_classes)


class DA3Model(nn.Module):
    """A network whose backbone is frozen and held in eval, with domains to switch between.

    Made by `lightning_da3.convert`. Calls like the network it was made from. With no domain active
    it computes what that network computes in eval.

    Args:
        backbone: The rewritten network.
        plan: By which it was rewritten.
        config: The user's choices.
        fingerprint: Of the user's backbone (see `lightning_da3.model.state.backbone_state`).
        architecture: Of the user's backbone (see `lightning_da3.model.state.architecture`).
    """

    def __init__(
        self,
        backbone: nn.Module,
        plan: Plan,
        config: DA3Config,
        fingerprint: str,
        architecture: str,
    ) -> None:
        super().__init__()
        self.architecture = architecture
        self.backbone = backbone
        self.bank = nn.ModuleDict()
        self._plan, self.config, self.fingerprint = plan, config, fingerprint
        self._original: Original | None = None
        self.budget_policy = BudgetPolicy(config.memory)
        self.progress = 1.0
        self.gate_loss_scale = 1.0
        self.gates_over_ranks = False  # True: every training batch is a rank's part of a global one
        self.executed_flops_fraction: Tensor | None = None
        self._active: str | None = None
        self._ledger: list[tuple[str, Executed]] = []  # of one forward pass
        for module in backbone.modules():
            if isinstance(module, Recorder):
                module.write_into(self._ledger)
        self.register_load_state_dict_pre_hook(complete_state)  # type: ignore[no-untyped-call]
        self.train(self.training)

    @property
    def plan(self) -> ModelPlan:
        """By which the network was rewritten. Printed, it says what a training step costs."""
        return ModelPlan.of(self._plan, self)

    def remember(self, network: nn.Module) -> None:
        """Keep a copy without values of the user's network, to tell what fine-tuning it costs."""
        with suppress(DA3Error):  # then only the plan's figures of fine-tuning are missing
            self._original = Original(network)

    @property
    def dtype(self) -> torch.dtype:
        """Of what the network computes, and of new domains; weights may rest in another."""
        dtype: torch.dtype = self._place()["dtype"]
        return dtype

    @property
    def original(self) -> Original | None:
        """What `remember` was given; a model that was pickled has forgotten it."""
        return self._original

    # --- the domains ------------------------------------------------------------------------------

    @property
    def domains(self) -> list[str]:
        """Names, in the order in which they were added."""
        return list(self.bank)

    @property
    def active_domain(self) -> str | None:
        """The domain that `forward` computes, or None for the backbone alone."""
        return self._active

    def domain(self, name: str) -> Domain:
        """The modules of one domain.

        Raises:
            DomainError: There is no such domain.
        """
        if name not in self.bank:
            raise DomainError(
                f"There is no domain {name!r}. There are {self.domains}; "
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
            num_classes: Scores of its head, at least 1. None exactly if the config has no head.
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
        domain = self._new_domain(num_classes, class_names)
        domain.requires_grad_(False)
        self.bank[name] = domain.train(self.training)

    def set_domain(self, name: str | None) -> None:
        """Activate a domain by changing references; None leaves the backbone alone.

        Parameters of the active domain require a gradient, all others do not.

        Args:
            name: One of `domains`, or None.

        Raises:
            DomainError: There is no such domain.
        """
        domain = None if name is None else self.domain(name)
        if self._active is not None and self._active != name:
            self.domain(self._active).requires_grad_(False)
        for host, place in self._inputs.items():
            adapter = None if domain is None else domain.adapters[host_key(host)]
            place.set_active(cast(Adapter | None, adapter))
        if self._head_slot is not None:
            self._head_slot.set_active(None if domain is None else domain.head)
        if domain is not None:
            domain.requires_grad_(True)
        self._active = name

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
        """The backbone alone inside a ``with`` block; afterwards the same domain as before."""
        before = self._active
        self.set_domain(None)
        try:
            yield
        finally:
            self.set_domain(before)

    # --- computing --------------------------------------------------------------------------------

    def forward(self, *args: Any, domains: Domains | None = None, **kwargs: Any) -> Any:
        """What the network returned before, for the active domain.

        While a domain trains, the output carries the gates' budget loss into the backward pass.

        Args:
            args: As the network takes them.
            domains: For inference, the domain of every sample along axis 0, None for the backbone
                alone; or ``"nearest"``, what `nearest_domains` says. All samples share one pass
                through the backbone; the active domain plays no part and stays active.
            kwargs: As the network takes them.

        Returns:
            The network's output. With `domains` a list with every sample's own, without axis 0:
            heads may have different numbers of classes.

        Raises:
            InputError: The batch does not fit the network; or `domains` does not fit the batch, or
                is given while training, or samples lie apart along other axes than 0 somewhere.
            DomainError: There is no such domain.
        """
        if args and isinstance(args[0], Tensor):
            check_input(args[0], self.plan)
        if domains is not None:
            return self._run_mixed(domains, args, kwargs)
        output, ledger = self._run_split(args, kwargs)
        output = _laid_out(output, args, kwargs)
        executed = self._executed(ledger)
        if not executed:
            return output
        gate = self.config.gate
        if gate is None or not (self.training and torch.is_grad_enabled()):
            return output
        return _carry(output, self.gate_loss(executed), self.gate_loss_scale)

    def _run(self, *args: Any, **kwargs: Any) -> tuple[Any, list[tuple[str, Executed]]]:
        """The output, and by host what was executed, in the order of the calls."""
        self._ledger.clear()
        try:
            with self._python():
                output = self.backbone(*args, **kwargs)
            return output, list(self._ledger)
        finally:
            self._ledger.clear()

    def _python(self) -> AbstractContextManager[Any]:
        """What stays Python keeps less inside; a compiler sees to that by itself."""
        if not self._plan.python or torch.compiler.is_compiling():
            return nullcontext()
        return KeepsLess(exact=self.config.memory.exact)

    def _run_split(self, args: Any, kwargs: Any) -> tuple[Any, list[tuple[str, Executed]]]:
        """As `_run`; a training step's batch in pieces, if it would not stay within the budget."""
        trained = self.budget_policy.holds and [p for p in self.parameters() if p.requires_grad]
        if not (trained and torch.is_grad_enabled()):
            return self._run(*args, **kwargs)
        count = batch_size(args, kwargs)
        split = self.budget_policy.microbatches_for(self, args, kwargs, self._check_apart)
        if split is None or not count or split.samples >= count:
            return self._run(*args, **kwargs)
        return run_microbatches(self._run, args, kwargs, split.counts(count), split.again, trained)

    @torch.no_grad()
    def _check_apart(self, args: Any, kwargs: Any) -> None:
        """Refuse to split a batch whose samples act on each other; two of them tell.

        Raises:
            InputError: They do.
        """
        pair = next(cut((args, kwargs), [2, (batch_size(args, kwargs) or 2) - 2]))
        with self._mixed([None, None]):
            whole, _ = self._run(*pair[0], **pair[1])
            with suppress(RuntimeError, InputError, AssertionError):  # of shapes, and of values
                parts, _ = run_microbatches(self._run, pair[0], pair[1], [1, 1])
                torch.testing.assert_close(parts, whole, rtol=1e-2, atol=1e-2, equal_nan=True)
                return
        raise InputError(
            f"A budget cannot be held by splitting a batch of {self.plan.network}: samples of a "
            "batch act on each other. Give it smaller batches."
        )

    def _executed(self, ledger: Sequence[tuple[str, Executed]]) -> list[Executed]:
        """What was executed; its share is remembered."""
        executed = [entry for _, entry in ledger]
        share = executed_fraction(executed).detach() if executed else None
        self.executed_flops_fraction = share
        return executed

    def gate_loss(self, executed: Sequence[Executed]) -> Tensor:
        """The weighted budget loss of one forward pass, a scalar."""
        assert self.config.gate is not None
        target = annealed_target(self.config.gate.target, self.progress)
        loss = budget_loss(executed, target, over_ranks=self.gates_over_ranks)
        return loss * self.config.gate.weight

    # --- several domains in one batch -------------------------------------------------------------

    def _run_mixed(self, domains: Domains, args: Any, kwargs: Any) -> list[Any]:
        if self.training and torch.is_grad_enabled():
            raise InputError(
                "`domains` is for inference: call `eval()`, or compute inside `torch.no_grad()`. "
                "To train several domains in one run, see `DomainLoader`."
            )
        count = samples_in((*args, *kwargs.values()))
        if isinstance(domains, str) and domains == NEAREST:
            domains = self.nearest_domains(*args, **kwargs)
        check_domains(domains, count)
        with torch.no_grad(), self._mixed(domains):
            output, ledger = self._run(*args, **kwargs)
        self._executed(ledger)
        listed = isinstance(next(iter([*args, *kwargs.values()])), (list, tuple))
        heads = [head for name in domains if (head := self._head(name)) is not None]
        axis = class_axis(heads[0]) if heads else -1
        return by_sample(output, count, [classes_of(h) for h in heads], axis, listed=listed)

    @contextmanager
    def _mixed(self, names: Sequence[str | None]) -> Iterator[None]:
        """Inside, each sample is computed by its own domain, and None by the backbone alone."""
        device, count = self._place()["device"], len(names)
        samples = {
            name: torch.tensor([i for i in range(count) if names[i] == name], device=device)
            for name in dict.fromkeys(names)
        }
        named = [(self.domain(n), positions) for n, positions in samples.items() if n is not None]
        slot, inputs = self._head_slot, self._inputs
        before = {host: place.active for host, place in inputs.items()}
        head_before = None if slot is None else slot.active
        try:
            for host, place in inputs.items():
                adapters = [cast(Adapter, d.adapters[host_key(host)]) for d, _ in named]
                if len(samples) > 1:  # or there is nothing to tell apart
                    own = [positions for _, positions in named]
                    place.set_active(MixedAdapters(host, adapters, own, count))
                else:
                    place.set_active(adapters[0] if adapters else None)
            if slot is not None and samples:
                heads = [cast(nn.Module, self._head(name)) for name in samples]
                mixed = MixedHeads(heads, list(samples.values()))
                slot.set_active(mixed if len(samples) > 1 else heads[0])
            yield
        finally:
            for host, place in inputs.items():
                place.set_active(before[host])
            if slot is not None:
                slot.set_active(head_before)

    @torch.no_grad()
    def fit_statistics(self, name: str, batches: Iterable[Any]) -> None:
        """Learn what a domain's samples look like to the backbone, for `nearest_domains`.

        One pass over the samples, forward only. The statistics are saved with the domain; as the
        backbone never changes, they stay right however the domain is trained.

        Args:
            name: One of `domains`.
            batches: Of its samples: tensors, as `forward` takes them first, or tuples or lists that
                begin with what it takes first, as loaders give them.

        Raises:
            DomainError: There is no such domain.
            InputError: A batch does not fit the network, or there are fewer than two samples.
        """
        domain = self.domain(name)
        device = self._place()["device"]
        statistics = self._new_statistics(device)
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
            kwargs: Likewise.

        Returns:
            One of `domains` for every sample.

        Raises:
            DomainError: There is no domain, or one without statistics.
            InputError: The batch does not fit the network.
        """
        known = {name: self.domain(name).statistics for name in self.domains}
        lacking = [name for name, statistics in known.items() if statistics is None]
        if lacking or not known:
            what = f"The domains {lacking} have no statistics" if lacking else "There is no domain"
            raise DomainError(
                f"{what} to be found by. `fit_statistics(name, batches)` learns them from samples; "
                "`domains=[..]` takes names instead."
            )
        features = self._features(*args, **kwargs)
        likelihoods = torch.stack(
            [s.log_likelihood(features) for s in known.values() if s is not None]
        )
        return [self.domains[i] for i in likelihoods.argmax(0).tolist()]

    def _features(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the backbone alone gives the adapters to read first and last, pooled, (N, D)."""
        if args and isinstance(args[0], Tensor):
            check_input(args[0], self.plan)
        count = samples_in((*args, *kwargs.values()))
        found: dict[HostInput, Tensor] = {}

        def note(place: nn.Module, inputs: tuple[Tensor]) -> None:
            found[cast(HostInput, place)] = cast(HostInput, place).features(inputs[0])

        places = [self._inputs[host.name] for host in self._read_hosts]
        hooks = [place.register_forward_pre_hook(note) for place in places]
        try:
            with self._mixed([None] * count):
                self._run(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        for place in places:
            rows = len(found.get(place, ()))
            if rows != count:
                raise InputError(
                    f"The network reads {rows} rows of features from {count} samples, which cannot "
                    "be told apart: nearest domains need a host that works on whole batches."
                )
        return torch.cat([found[place] for place in places], dim=1)

    @torch.no_grad()
    def gate_maps(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Where every host of the active domain runs for this input.

        Args:
            args: As `forward` takes them.
            kwargs: Likewise.

        Returns:
            By host name, zeros and ones of shape (N, 1, *grid), in the order of the plan.
        """
        maps = {name: executed.gate for name, executed in self._run(*args, **kwargs)[1]}
        return {host.name: maps[host.name] for host in self.plan.hosts if host.name in maps}

    def train(self, mode: bool = True) -> DA3Model:
        """Domains follow `mode`; the backbone is held in eval whatever it says.

        Frozen layers compute the same either way and show `mode`; only layers that could tell the
        difference show eval, so that Lightning warns of them and not of every other layer. What
        stays Python follows `mode` (a detector returns its losses only in train mode).
        """
        super().train(mode)
        for layer in self.backbone.modules():
            if _has_modes(layer):
                layer.eval()
        for path, _ in self.plan.python:
            self.backbone.get_submodule(path).training = mode
        return self

    def set_progress(self, progress: float) -> None:
        """Say how far training is, in [0, 1]: closes the gates slowly and ends their noise."""
        self.progress = progress
        gate = self.config.gate
        for adapter in self.bank.modules():
            if isinstance(adapter, Adapter):
                adapter.noisy = gate is not None and gate.noise and progress < NOISE_UNTIL

    # --- files and state --------------------------------------------------------------------------

    def save_domain(self, name: str, path: str | os.PathLike[str], **metadata: Any) -> None:
        """Write one domain to a safetensors file, whole or not at all.

        Args:
            name: One of `domains`.
            path: Of the file; its folder must exist.
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
            path: Of the file.
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
        about = file.metadata
        classes = (about["num_classes"], about.get("class_names"))
        try:
            check_name(about["domain"])
            # nothing is allocated before it is known that the file has as much to put there
            expected = self._new_domain(*classes, device="meta")
            if HAS_STATISTICS in file.tensors:
                expected.statistics = self._new_statistics(torch.device("meta"))
            check_tensors(file.tensors, expected.state_dict())
        except (DA3Error, RuntimeError, TypeError) as error:  # PyTorch's own, of absurd sizes
            raise CheckpointError(
                f"The domain file {str(path)!r} does not fit this model: {error}"
            ) from error
        name = about["domain"] if name is None else name
        self.add_domain(name, *classes)
        if HAS_STATISTICS in file.tensors:
            self.expect_statistics(name)
        self.domain(name).load_state_dict(file.tensors)
        return name

    def expect_statistics(self, name: str) -> None:
        """Make room for statistics that are about to be loaded."""
        if self.domain(name).statistics is None:
            self.domain(name).statistics = self._new_statistics(self._place()["device"])

    def get_extra_state(self) -> dict[str, Any]:
        """What a state dict must say beside its tensors; plain types only."""
        domains = {name: self.domain(name) for name in self.domains}
        return {
            "backbone": self.fingerprint,
            "config": self.config.to_dict(),
            "num_classes": {name: domain.num_classes for name, domain in domains.items()},
            "class_names": {name: domain.class_names for name, domain in domains.items()},
            "active": self._active,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Everything in it was used before the tensors were loaded (`complete_state`)."""

    # --- parts ------------------------------------------------------------------------------------

    @property
    def _head_slot(self) -> HeadSlot | None:
        if self.plan.head is None:
            return None
        return cast(HeadSlot, self.backbone.get_submodule(self.plan.head))

    @property
    def _inputs(self) -> dict[str, HostInput]:
        found = {}
        for part in self.plan.parts:
            gm = self.backbone.get_submodule(part.path)
            for host in part.hosts:
                found[host.name] = gm.get_submodule(f"{INPUTS}.{host_key(host.name)}")
        return cast(dict[str, HostInput], found)

    def _head(self, name: str | None) -> nn.Module | None:
        """A domain's head, or the backbone's own; None if all keep that."""
        slot = self._head_slot
        return slot if slot is None else slot.original if name is None else self.domain(name).head

    @property
    def _read_hosts(self) -> list[HostPlan]:
        """Whose inputs tell domains apart: the first is rich in style, the last in content."""
        hosts = self.plan.hosts
        return [hosts[0], hosts[-1]] if len(hosts) > 1 else [hosts[0]]

    def _new_statistics(self, device: torch.device) -> Statistics:
        return Statistics([host.in_channels for host in self._read_hosts]).to(device)

    @property
    def _why_no_head(self) -> str:
        if self.config.head is None:
            return "its config says head=None"
        return f"no single Linear or convolution leads to the output of {self.plan.network}"

    def _place(self) -> dict[str, Any]:
        """Where and in which type the network computes; weights that rest do not tell."""
        parameters = list(self.backbone.parameters())
        others = [p for p in parameters if p.dtype != self.config.memory.stored_dtype]
        like = (others or parameters)[0]
        return {"device": like.device, "dtype": like.dtype}

    def extra_repr(self) -> str:
        """What no layer shows by itself."""
        weights = self.config.memory.weights
        return "" if weights == "same" else f"weights={weights!r}: the backbone is rounded once"

    def _new_domain(
        self,
        num_classes: int | None,
        class_names: Sequence[str] | None,
        device: torch.device | str | None = None,
    ) -> Domain:
        place = self._place()
        if device is not None:
            place["device"] = torch.device(device)
        head = self._new_head(num_classes, place["device"])
        with place["device"]:
            adapters = {
                host_key(host.name): self._new_adapter(host).to(**place) for host in self.plan.hosts
            }
        return Domain(adapters, head, num_classes, class_names)

    def _new_adapter(self, host: HostPlan) -> Adapter:
        choice = self.config.adapter
        return Adapter(
            host.in_channels,
            host.out_channels,
            choice.hidden_channels,
            1 if host.stride is None else choice.kernel_size,
            host.axes,
            gated=self.config.gate is not None,
            exact=self.config.memory.exact,
        )

    def _new_head(self, num_classes: int | None, device: torch.device) -> nn.Module | None:
        slot = self._head_slot
        if slot is None:
            if num_classes is not None:
                raise ConfigError(
                    f"`num_classes` is {num_classes!r}, but every domain keeps the network's own "
                    f"head: {self._why_no_head}. Leave `num_classes` out, or name a layer to "
                    "replace: DA3Config(head='classifier.4'), say."
                )
            return None
        if num_classes is None:
            raise ConfigError(
                f"`num_classes` is missing: every domain gets its own {self.plan.head!r}. "
                "Say how many classes, as in `add_domain('flowers', num_classes=102)`."
            )
        if not isinstance(num_classes, int) or isinstance(num_classes, bool) or num_classes < 1:
            raise ConfigError(f"`num_classes` must be an int of at least 1, got {num_classes!r}.")
        return new_head(slot.original, num_classes, device)


def check_name(name: object) -> None:
    """Refuse what cannot name a domain; what can is a file name everywhere.

    Raises:
        DomainError: It is ill-formed.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise DomainError(
            f"{name!r} cannot name a domain: use 1 to 100 letters, digits, '-' and '_', "
            "beginning with a letter or digit."
        )


def checked_class_names(names: Sequence[str] | None, num_classes: int | None) -> list[str] | None:
    """The names as a list.

    Raises:
        ConfigError: They are no strings, or not as many as there are classes.
    """
    if names is None:
        return None
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"`class_names` must be a sequence of str, got {names!r}.")
    if len(names) != num_classes:
        raise ConfigError(
            f"`class_names` must have one name for each of the {num_classes} classes, got "
            f"{len(names)}."
        )
    return list(names)


_MODAL = (
    nn.modules.batchnorm._NormBase,
    nn.modules.dropout._DropoutNd,
    nn.RReLU,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.TransformerEncoderLayer,
    nn.TransformerEncoder,
)


def _has_modes(layer: nn.Module) -> bool:
    """Whether a layer of the rewritten backbone may compute differently in train mode."""
    home = type(layer).__module__
    if home.startswith("torch.nn."):
        return isinstance(layer, _MODAL)
    return not isinstance(layer, fx.GraphModule) and not home.startswith("lightning_da3.")


def _laid_out(output: Any, args: Any, kwargs: Any) -> Any:
    """Maps are contiguous if those of the input are: what follows may take views of them."""
    if any(isinstance(x, Tensor) and lies_channels_last(x) for x in tree_leaves((args, kwargs))):
        return output
    return tree_map_only(Tensor, lambda y: y.contiguous() if lies_channels_last(y) else y, output)


def _carry(output: Any, loss: Tensor, scale: float) -> Any:
    """`loss` rides on the first tensor of `output` that requires a gradient."""
    leaves, structure = tree_flatten(output)
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            leaves[i] = with_loss(leaf, loss, scale)
            return tree_unflatten(leaves, structure)
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            fields = {f.name: getattr(leaf, f.name) for f in dataclasses.fields(leaf) if f.init}
            carrying = _carry(fields, loss, scale)
            if carrying is not fields:
                leaves[i] = dataclasses.replace(leaf, **carrying)
                return tree_unflatten(leaves, structure)
    return output
