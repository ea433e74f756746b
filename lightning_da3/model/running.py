"""Running a rewritten network: within a budget, with gates and their loss, and by its methods."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
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
)
from lightning_da3.budget.policy import BudgetPolicy
from lightning_da3.config import DA3Config
from lightning_da3.eager import KeepsLess
from lightning_da3.errors import ConversionWarning
from lightning_da3.model.batches import carrying, explain_types, laid_out, tell_that_nothing_trains
from lightning_da3.model.clashes import guard_backbone_, with_own_config
from lightning_da3.model.entries import Entry, MethodOf
from lightning_da3.model.methods import Method, Methods
from lightning_da3.model.original import Original
from lightning_da3.model.pending import trains_later_
from lightning_da3.model.saving import SavesDomains
from lightning_da3.model.smaller import Candidates, Smaller
from lightning_da3.nn.call import Call, Calls, Executed, Noise
from lightning_da3.nn.gate import budget_loss, executed_fraction
from lightning_da3.planning.plan import Plan
from lightning_da3.schedule import NOISE_UNTIL, annealed_target
from lightning_da3.tracing.guards import GuardError


class Running(SavesDomains):
    """A backbone with domains that runs. Everything is an attribute of `DA3Model`; see there."""

    candidates: Candidates | None = None  # while branches are chosen
    _settled: frozenset[str] = frozenset()  # what the backbone itself skips
    _follows = True  # what is skipped computes with the tensors that the backbone has by now

    def __init__(
        self,
        backbone: nn.Module,
        plan: Plan,
        config: DA3Config,
        fingerprint: str,
        architecture: str,
        original: Original | None = None,
    ) -> None:
        original = original or Original()
        config = with_own_config(config, original.network)
        super().__init__(backbone, plan, config, fingerprint, architecture)
        guard_backbone_(backbone, original.network, self.calls)
        self.original = original
        self.budget_policy = BudgetPolicy(config.memory)
        self.progress = 1.0
        self.gate_loss_scale: float | None = None
        self.gates_over_ranks = False
        self.methods = Methods()
        self.train(self.training)

    def _computed(
        self, run: Callable[[Call, Any, Any], tuple[Any, Ledger]], args: Any, kwargs: Any
    ) -> Any:
        """The output of one call, ready to be trained with.

        Args:
            run: Computes it, and notes how much of every host was executed.
            args: The arguments.
            kwargs: The named arguments.
        """
        call, name = self.calls.resting, self._active
        output, ledger = run(self._noisy(call, args, kwargs), args, kwargs)
        executed = self._executed(ledger, call)
        output = laid_out(output, (args, kwargs))
        trains = self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if trains and self.bank and not self._was_set and call is self.calls.everywhere:
            self._was_set = tell_that_nothing_trains(output, self.domains)
        if executed and self.config.cell_gates and self.training and torch.is_grad_enabled():
            loss, scale = self.gate_loss(executed), self.gate_loss_scale
            if scale is None and call.unit is not None:
                output = carrying(output, loss, call.unit.beside(loss))
            else:
                output = carrying(output, loss, scale)
        if name is not None and torch.is_grad_enabled():
            self._may_wait = True
            trains_later_(output, self.domain(name), lambda: self._active == name)
        return output

    # --- other methods of the user's network ------------------------------------------------------

    def run_method(self, path: str, method: str, args: Any, kwargs: Any) -> Any:
        """What a method of a part of the user's network returns, for the active domain.

        Args:
            path: The part's dotted name; "" is the network.
            method: The method's name.
            args: Its arguments.
            kwargs: Its named arguments.

        Raises:
            DA3Error: It cannot be rewritten, or holds a part of a host whose adapter could not act.
        """
        run = partial(self._run_method_within_budget, MethodOf(path, method))
        return self._computed(run, args, kwargs)

    def _run_method_within_budget(
        self, method: MethodOf, call: Call, args: Any, kwargs: Any
    ) -> tuple[Any, Ledger]:
        """A pass through a method; a training step's batch is split as `forward`'s would be."""

        def run(call: Call, *args: Any, **kwargs: Any) -> tuple[Any, Ledger]:
            entry, tensors = Entry.of(method.path, method.method, args, kwargs, call.skipped)
            return self._run_entry(call, entry, tensors)

        if not self.budget_policy.holds or batch_size(args, kwargs) is None:
            return run(call, *args, **kwargs)
        return self._run_within_budget(call, args, kwargs, run, method)

    def _run_entry(self, call: Call, entry: Entry, tensors: Sequence[Tensor]) -> tuple[Any, Ledger]:
        """One pass through a method, rewritten now if that is needed."""

        def make(python: str | None, whole: bool) -> Method:
            return Method(entry, *self._about_network, tensors, python, whole)

        def run(found: Method) -> tuple[Any, Ledger]:
            ledger: Ledger = []
            with self.calls.running(call.noted_in(ledger)), self._python(found.plan):
                return found(self.backbone, call, tensors), ledger

        ran: tuple[Any, Ledger] = self.methods.run(entry, make, run)
        return ran

    def own_parameters(self, path: str) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of the active domain's adapters in a part of the user's network."""
        for name, adapter in self.calls.resting.adapters.items():
            host = name.split(":")[0]
            if not path or host == path or host.startswith(f"{path}."):
                yield from adapter.named_parameters(f"adapters.{name}")

    # --- one pass ---------------------------------------------------------------------------------

    def _noisy(self, call: Call, args: Any, kwargs: Any) -> Call:
        """The call of a whole batch, with noise on its gates while they are learned."""
        gate = self.config.cell_gates
        if gate is None or not (gate.noise and self.training and self.progress < NOISE_UNTIL):
            return call
        noise = self.calls.here.noise or Noise(batch_size(args, kwargs) or 0)
        return call.with_noise(noise)

    def _run_within_budget(
        self,
        call: Call,
        args: Any,
        kwargs: Any,
        run: Callable[..., tuple[Any, Ledger]] | None = None,
        method: MethodOf | None = None,
    ) -> tuple[Any, Ledger]:
        """`_run`; a training step's batch goes in microbatches if it would exceed the budget."""
        policy, trains = self.budget_policy, self.backbone if call.alone else self
        run = run or self._run
        if not (torch.is_grad_enabled() and any(p.requires_grad for p in trains.parameters())):
            return run(call, *args, **kwargs)
        count, check = batch_size(args, kwargs), partial(self._check_apart, run)
        split = policy.microbatches_for(self, args, kwargs, check, method)
        if split is None or not count or split.samples >= count:
            return run(call, *args, **kwargs)

        def run_of(start: int, samples: int) -> Run:
            return partial(run, call.part(start, samples))

        return run_microbatches(run_of, args, kwargs, split.counts(count), split.again, [trains])

    @torch.no_grad()
    def _check_apart(self, run: Run, args: Any, kwargs: Any) -> None:
        """Before a batch is split for the first time: refuse samples that act on each other."""
        check_apart(partial(run, Call()), args, kwargs, self.plan.network)

    def _run(self, call: Call, *args: Any, **kwargs: Any) -> tuple[Any, Ledger]:
        """One pass through the backbone: the output, and how much of every host was executed."""
        ledger: Ledger = []
        network, plan = self._computing_for(call)
        with self.calls.running(call.noted_in(ledger)), self._python(plan):
            try:
                return network(*args, **kwargs), ledger
            except RuntimeError as error:
                explain_types((args, kwargs), self.dtype, self.plan.network, error)
                raise
            except GuardError as error:
                if torch.compiler.is_compiling() or self.original.network is None:
                    raise
                self._tell_of_another_way(error)
        return self._run_entry(call, *Entry.of("", "forward", args, kwargs, call.skipped))

    def _computing_for(self, call: Call) -> tuple[nn.Module, Plan]:
        """The rewritten network that a call runs, without the branches that it skips."""
        if not call.skipped or call.skipped == self._settled:
            return self.backbone, self.plan
        if torch.compiler.is_compiling():  # it was made before
            form: Smaller | Candidates = self.methods.smaller[call.skipped]
            return form.root, form.plan
        form = self.candidates or self.smaller(call.skipped)
        if self._follows:
            form.follow(self.backbone)
        return form.root, form.plan

    def smaller(self, skipped: frozenset[str]) -> Smaller:
        """The network without these branches, made now if it is not there.

        Raises:
            DA3Error: The model does not know its network any more.
        """
        make = partial(Smaller, skipped, *self._about_network)
        return self.methods.smaller_of(skipped, make)

    def _make_smaller(self, skipped: frozenset[str]) -> None:
        if skipped and skipped != self._settled and self.candidates is None:
            self.smaller(skipped)

    def _forget_smaller(self) -> None:
        if self.candidates is None:
            self.methods.keep_only([frozenset(self.domain(name).skipped) for name in self.domains])

    def _apply(self, fn: Any, recurse: bool = True) -> Running:
        """Move what is skipped by domains along."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._let_follow()
        return self

    def _let_follow(self) -> None:
        for form in self.methods.smaller.values():
            form.follow(self.backbone)

    def __getstate__(self) -> dict[str, Any]:
        """Without what is there for a choice of branches."""
        return {**super().__getstate__(), "candidates": None}

    @property
    def _about_network(self) -> tuple[Original, nn.Module, Plan, DA3Config, Calls]:
        return self.original, self.backbone, self._whole, self.config, self.calls

    @property
    def skipped_now(self) -> frozenset[str]:
        """The branches that new calls of this thread skip."""
        return self.calls.resting.skipped

    @property
    def network_now(self) -> nn.Module:
        """The rewritten network that new calls of this thread compute with."""
        return self._computing_for(self.calls.resting)[0]

    @property
    def plan_now(self) -> Plan:
        """Its plan."""
        return self._computing_for(self.calls.resting)[1]

    def settle_(self) -> None:
        """Become the smaller network that the active domain computes with, if it skips any.

        For copies that predict what steps cost: what is asked of the network and its plan is then
        of what runs.
        """
        call = self.calls.resting
        if call.skipped != self._settled:
            form = self.smaller(call.skipped)
            self.backbone, self.plan, self._settled = form.root, form.plan, call.skipped

    def _tell_of_another_way(self, error: GuardError) -> None:
        if not self.methods.has("", "forward"):
            warnings.warn(
                f"{self.plan.network} is traced once more, for inputs like this one. {error.fact}",
                ConversionWarning,
                stacklevel=6,
            )

    def _python(self, plan: Plan) -> AbstractContextManager[Any]:
        """What stays Python keeps less inside; a compiler sees to that by itself."""
        if not plan.python or torch.compiler.is_compiling():
            return nullcontext()
        return KeepsLess(exact=self.config.memory.exact)

    def _executed(self, ledger: Ledger, call: Call) -> list[Executed]:
        """What was executed; its share is remembered."""
        executed, here = [entry for _, entry in ledger], self.calls.here
        here.whole = not (executed or call.skipped or call.alone)
        if executed:
            here.executed = executed_fraction(executed).detach()
        elif call.skipped:
            here.executed = torch.tensor(self._whole.executed_share(call.skipped))
        else:
            here.executed = None
        return executed

    @property
    def executed_flops_fraction(self) -> Tensor | None:
        """The share of the hosts' FLOPs that gates let run in the last pass of this thread.

        Of a domain that skips branches, without gates of cells: the share of the whole network's.
        1 of other domains without gates: everything runs. None before the first pass, and where no
        domain was active.
        """
        return torch.tensor(1.0) if self.calls.here.whole else self.calls.here.executed

    @property
    def decided_flops_fraction(self) -> Tensor | None:
        """`executed_flops_fraction` where gates or skipped branches decide it; else None.

        For logs: a curve that is 1 whatever happens says nothing.
        """
        return self.calls.here.executed

    def gate_loss(self, executed: Sequence[Executed]) -> Tensor:
        """The weighted budget loss of one forward pass, a scalar."""
        gate = self.config.cell_gates
        assert gate is not None
        target = annealed_target(gate.target, self.progress)
        loss = budget_loss(executed, target, over_ranks=self.gates_over_ranks)
        return loss * gate.weight
