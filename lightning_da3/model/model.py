"""DA3Model: a frozen backbone and any number of domains. No Lightning."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_da3.budget.microbatches import (
    Ledger,
    Run,
    batch_size,
    check_apart,
    run_microbatches,
    samples_in,
)
from lightning_da3.budget.policy import BudgetPolicy
from lightning_da3.config import DA3Config, is_finite
from lightning_da3.eager import KeepsLess
from lightning_da3.errors import ConfigError, InputError
from lightning_da3.formatting import shown
from lightning_da3.model.batches import (
    carrying,
    check_input,
    explain_types,
    laid_out,
    tell_that_nothing_trains,
)
from lightning_da3.model.mixed import NEAREST, Domains, by_sample, check_domains, check_outside
from lightning_da3.model.modes import hold_in_eval_
from lightning_da3.model.nearest import (
    check_known,
    joined_features,
    likeliest,
    new_statistics,
    read_hosts,
)
from lightning_da3.model.original import Original
from lightning_da3.model.pending import trains_later_
from lightning_da3.model.saving import SavesDomains
from lightning_da3.nn.call import Call, Executed, Noise
from lightning_da3.nn.gate import (
    annealed_target,
    budget_loss,
    executed_fraction,
)
from lightning_da3.nn.head import class_axis, classes_of
from lightning_da3.planning.plan import Plan
from lightning_da3.torch_private.trees import tree_map_only

NOISE_UNTIL = 0.8  # of training; the gates settle without noise


class DA3Model(SavesDomains):
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

    def __init__(
        self,
        backbone: nn.Module,
        plan: Plan,
        config: DA3Config,
        fingerprint: str,
        architecture: str,
        original: Original | None = None,
    ) -> None:
        super().__init__(backbone, plan, config, fingerprint, architecture)
        self.original = original or Original()
        self.budget_policy = BudgetPolicy(config.memory)
        self.progress = 1.0
        self.gate_loss_scale: float | None = None
        self.gates_over_ranks = False
        self.train(self.training)

    # --- computing: forward, then what it calls, in order -----------------------------------------

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
        check_input(args, self.plan)
        if domains is not None:
            return self._run_mixed(domains, args, kwargs)
        call, name = self.calls.resting, self._active
        output, ledger = self._run_within_budget(self._noisy(call, args, kwargs), args, kwargs)
        executed = self._executed(ledger)
        output = laid_out(output, (args, kwargs))
        trains = self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if trains and self.bank and not self._was_set and call is self.calls.everywhere:
            self._was_set = tell_that_nothing_trains(output, self.domains)
        if executed and self.config.gate and self.training and torch.is_grad_enabled():
            loss, scale = self.gate_loss(executed), self.gate_loss_scale
            if scale is None and call.unit is not None:
                output = carrying(output, loss, call.unit.beside(loss))
            else:
                output = carrying(output, loss, scale)
        if name is not None and torch.is_grad_enabled():
            trains_later_(output, self.domain(name), lambda: self._active == name)
        return output

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
        slots = self._slots
        with torch.no_grad():
            output, ledger = self._run(slots.mixed(own, self._device), *args, **kwargs)
        self._executed(ledger)
        heads = [head for domain in own if (head := slots.head_of(domain)) is not None]
        axis = class_axis(heads[0]) if heads else -1
        listed = isinstance(batch[0], (list, tuple))
        return by_sample(output, count, [classes_of(h) for h in heads], axis, listed=listed)

    def _noisy(self, call: Call, args: Any, kwargs: Any) -> Call:
        """The call of a whole batch, with noise on its gates while they are learned."""
        gate = self.config.gate
        if gate is None or not (gate.noise and self.training and self.progress < NOISE_UNTIL):
            return call
        noise = self.calls.here.noise or Noise(batch_size(args, kwargs) or 0)
        return call.with_noise(noise)

    def _run_within_budget(self, call: Call, args: Any, kwargs: Any) -> tuple[Any, Ledger]:
        """`_run`; a training step's batch goes in microbatches if it would exceed the budget."""
        policy, trains = self.budget_policy, self.backbone if call.alone else self
        trained = [p for p in trains.parameters() if p.requires_grad]
        if not (trained and torch.is_grad_enabled()):
            return self._run(call, *args, **kwargs)
        count = batch_size(args, kwargs)
        split = policy.microbatches_for(self, args, kwargs, self._check_apart)
        if split is None or not count or split.samples >= count:
            return self._run(call, *args, **kwargs)

        def run_of(start: int, samples: int) -> Run:
            return partial(self._run, call.part(start, samples))

        return run_microbatches(run_of, args, kwargs, split.counts(count), split.again, trained)

    @torch.no_grad()
    def _check_apart(self, args: Any, kwargs: Any) -> None:
        """Before a batch is split for the first time: refuse samples that act on each other."""
        check_apart(partial(self._run, Call()), args, kwargs, self.plan.network)

    def _run(self, call: Call, *args: Any, **kwargs: Any) -> tuple[Any, Ledger]:
        """One pass through the backbone: the output, and how much of every host was executed."""
        ledger: Ledger = []
        with self.calls.running(call.noted_in(ledger)), self._python():
            try:
                return self.backbone(*args, **kwargs), ledger
            except RuntimeError as error:
                explain_types((args, kwargs), self.dtype, self.plan.network, error)
                raise

    def _python(self) -> AbstractContextManager[Any]:
        """What stays Python keeps less inside; a compiler sees to that by itself."""
        if not self.plan.python or torch.compiler.is_compiling():
            return nullcontext()
        return KeepsLess(exact=self.config.memory.exact)

    def _executed(self, ledger: Ledger) -> list[Executed]:
        """What was executed; its share is remembered."""
        executed = [entry for _, entry in ledger]
        share = executed_fraction(executed).detach() if executed else None
        self.calls.here.executed = share
        return executed

    @property
    def executed_flops_fraction(self) -> Tensor | None:
        """The share of the hosts' FLOPs that the last pass of this thread executed."""
        return self.calls.here.executed

    def gate_loss(self, executed: Sequence[Executed]) -> Tensor:
        """The weighted budget loss of one forward pass, a scalar."""
        assert self.config.gate is not None
        target = annealed_target(self.config.gate.target, self.progress)
        loss = budget_loss(executed, target, over_ranks=self.gates_over_ranks)
        return loss * self.config.gate.weight

    @torch.no_grad()
    def gate_maps(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Where every host of the active domain runs for this input.

        Args:
            args: As `forward` takes them.
            kwargs: As `forward` takes them.

        Returns:
            Zeros and ones of shape (N, 1, *grid) by host name, in the order of the plan.
        """
        maps = {
            name: executed.gate
            for name, executed in self._run(self.calls.resting, *args, **kwargs)[1]
        }
        return {host.name: maps[host.name] for host in self.plan.hosts if host.name in maps}

    # --- the nearest domain -----------------------------------------------------------------------

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

    # --- modes ------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> DA3Model:
        """Domains follow `mode`; the backbone is held in eval whatever it says.

        Frozen layers compute the same either way and show `mode`; only layers that could tell the
        difference show eval, so that Lightning warns of them and not of every other layer. What
        stays Python follows `mode` (a detector returns its losses only in train mode).
        """
        super().train(mode)
        hold_in_eval_(self.backbone)
        for path, _ in self.plan.python:
            module = self.backbone.get_submodule(path)
            if not type(module).__module__.startswith("torch.nn."):
                module.training = mode
        return self

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

    def extra_repr(self) -> str:
        """What no layer shows by itself."""
        weights = self.config.memory.weights
        return "" if weights == "same" else f"weights={weights!r}: the backbone is rounded once"
