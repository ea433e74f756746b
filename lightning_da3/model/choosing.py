"""Which residual branches a domain can do without: those that hurt the least for every FLOP."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_da3.budget.microbatches import samples_in
from lightning_da3.choices import is_finite
from lightning_da3.errors import ConfigError, InputError
from lightning_da3.formatting import shown
from lightning_da3.model.branches import nothing_to_skip
from lightning_da3.model.mixed import chosen
from lightning_da3.model.smaller import Candidates
from lightning_da3.model.starting import StartsHeads, asked_of, linear_head
from lightning_da3.nn.ridge import Ridge
from lightning_da3.planning.plan import Plan

MOST_SAMPLES = 256
ROUNDS = 3  # how often branches are ranked anew on the way to the target


class ChoosesBranches(StartsHeads):
    """What chooses the branches that domains skip. Everything is an attribute of `DA3Model`."""

    def choose_branches(
        self,
        name: str,
        batches: Iterable[Any],
        target: float,
        loss: Callable[[Any, Any], Tensor] = F.cross_entropy,
    ) -> tuple[str, ...]:
        """Choose the residual branches that a domain skips, and let it skip them (`skip`).

        Each branch is skipped in turn, and a ridge regression of what the loss asks of scores that
        are all zero (as in `start_head`) from the features that the head reads is fitted on one
        half of the samples and judged on the other, both ways. Those whose absence adds the least
        error for the FLOPs that it saves go first; twice on the way the others are ranked anew.
        Call it before training, and `start_head` after it.

        Args:
            name: One of `domains`.
            batches: Its samples, as for `start_head`; of more than 256, as many are drawn.
            target: The share of the network's FLOPs that is to be left at most, in (0, 1].
            loss: As for `start_head`.

        Returns:
            The branches that it skips now.

        Raises:
            DomainError: There is no such domain.
            ConfigError: `batches` are none, the domain has no linear head of its own, nothing can
                be skipped, or the target cannot be reached.
            InputError: As for `start_head`.
        """
        if not isinstance(batches, Iterable):
            raise ConfigError(
                f"`batches` must be a list or a loader of batches, got {type(batches).__name__}."
            )
        choice = BranchChoice(self, name, target)
        some = drawn_samples(batches)
        with self._as_in_use(name), self.choosing():
            choice.make([partial(self._loss_of, batch, loss) for batch in some])
        self.skip(name, choice.skipped)
        return choice.skipped

    @contextmanager
    def choosing(self) -> Iterator[None]:
        """In the block, other branches can be skipped at once, for inference alone."""
        try:
            self.candidates = Candidates(*self._about_network)
            yield
        finally:
            self.candidates = None
            self._forget_smaller()

    @contextmanager
    def skipping(self, name: str, branches: tuple[str, ...]) -> Iterator[None]:
        """In the block, inside of one of `choosing`, a domain skips these branches."""
        before, candidates = self.skipped(name), self.candidates
        assert candidates is not None
        try:
            self._let_skip(name, branches)
            with candidates.without(branches):
                yield
        finally:
            self._let_skip(name, before)
            self.methods.keep_only([])  # what other methods skipped


class BranchChoice:
    """Chooses the branches that a domain skips; see `ChoosesBranches.choose_branches`.

    Args:
        model: The model.
        name: The domain's.
        target: The share of the network's FLOPs that is to be left at most.
        others: Adds what other processes gathered.

    Attributes:
        skipped: What was chosen.

    Raises:
        ConfigError: Nothing can be skipped, or not enough; or the domain has no linear head of its
            own.
    """

    def __init__(
        self,
        model: ChoosesBranches,
        name: str,
        target: float,
        others: Callable[[Ridge], Ridge] = lambda ridge: ridge,
    ) -> None:
        check_target(model.plan, target)
        self._model, self._name, self._target, self._others = model, name, target, others
        self._head = linear_head(model.domain(name).head, name)
        self.skipped: tuple[str, ...] = ()

    def make(self, losses: Iterable[Callable[[], Any]]) -> None:
        """Choose.

        Args:
            losses: Call the network, whose domain is active, and give the loss of its output; one
                for every batch. They are called again and again.

        Raises:
            InputError: A loss does not depend on the head, there are not enough samples, or figures
                are not finite.
        """
        model, losses = self._model, list(losses)
        plan, left, rounds = model.plan, 1.0, 0
        ranked: list[str] = []
        while left > self._target:
            if 1.0 - left >= rounds / ROUNDS * (1.0 - self._target):
                ranked, rounds = self._ranked(losses), rounds + 1
            more = (*self.skipped, ranked.pop(0))
            if plan.executed_share(more) < left:  # or it is in one that is skipped
                self.skipped, left = more, plan.executed_share(more)
        self.skipped = tuple(b.name for b in plan.branches if b.name in self._needed())

    def _needed(self) -> tuple[str, ...]:
        """Those without which the target is missed: a large one may make smaller ones needless."""
        needed = self.skipped
        for name in reversed(self.skipped):  # those that cost the most come last
            others = tuple(n for n in needed if n != name)
            if self._model.plan.executed_share(others) <= self._target:
                needed = others
        return needed

    def _ranked(self, losses: list[Callable[[], Any]]) -> list[str]:
        """The other branches, those first whose absence costs the least for every FLOP."""
        plan, now = self._model.plan, self._error((), losses)
        left = plan.executed_share(self.skipped)
        price: dict[str, float] = {}
        for branch in plan.branches:
            saved = left - plan.executed_share((*self.skipped, branch.name))
            if saved > 0:  # or it is in one that is skipped
                price[branch.name] = (self._error((branch.name,), losses) - now) / saved
        return sorted((n for n in price if n not in self.skipped), key=price.__getitem__)

    def _error(self, more: tuple[str, ...], losses: list[Callable[[], Any]]) -> float:
        """The error of regressions on halves of the samples, with these branches skipped, too."""
        halves = [Ridge(centred=self._head.bias is not None) for _ in range(2)]
        count = 0
        with self._model.skipping(self._name, (*self.skipped, *more)):
            for loss in losses:
                for features, asked in asked_of(self._head, loss, self._name):
                    half_of = _halves(count, len(features)).to(features.device)
                    for half, ridge in enumerate(halves):
                        own = half_of == half
                        ridge.add(features[own].flatten(0, -2), asked[own].flatten(0, -2))
                    count += len(features)
        halves = [self._others(ridge) for ridge in halves]
        if not all(ridge.count for ridge in halves):
            raise InputError(
                f"The branches that {self._name!r} skips are chosen by its samples; there must be "
                "at least two."
            )
        if not all(ridge.is_finite() for ridge in halves):
            raise InputError(
                f"The branches that {self._name!r} skips cannot be chosen: some features, or "
                "gradients of the loss, are not finite. Look for such values in the batches."
            )
        even, odd = halves
        return odd.error(*even.solve()) + even.error(*odd.solve())


def _halves(start: int, count: int) -> Tensor:
    """Which half samples are of, zeros and ones: one of every two, in no order that data has."""
    drawn = torch.randint(2, (509,), generator=torch.Generator().manual_seed(0))
    samples = torch.arange(start, start + count)
    return (samples + drawn[samples // 2 % len(drawn)]) % 2


def check_target(plan: Plan, target: object) -> None:
    """Refuse a share of FLOPs that no choice of branches leaves.

    Raises:
        ConfigError: It is no share, or too small.
    """
    if not (is_finite(target) and 0.0 < target <= 1.0):
        raise ConfigError(f"`target` must lie in (0, 1], got {shown(target)}.")
    if not plan.branches:
        raise ConfigError(nothing_to_skip(plan))
    least = plan.executed_share([branch.name for branch in plan.branches])
    if target < least:
        raise ConfigError(
            f"`target` is {target}, but {least:.3f} of the network's FLOPs are left where "
            f"{plan.network} skips all of its {len(plan.branches)} branches. Raise it."
        )


def drawn_samples(batches: Iterable[Any], most: int = MOST_SAMPLES) -> list[Any]:
    """So many samples at most, drawn from all batches: these may come sorted by class."""
    generator = torch.Generator().manual_seed(0)
    kept: list[tuple[Tensor, Any]] = []
    for batch in batches:
        if not isinstance(batch, (list, tuple)) or len(batch) < 2:
            return [batch]  # whoever computes its loss says what is wrong
        pair = tuple(batch[:2])
        kept.append((torch.rand(samples_in(pair), generator=generator), pair))
        numbers = torch.cat([own for own, _ in kept])
        if len(numbers) > most:
            kept = [*_below(kept, float(numbers.kthvalue(most).values))]
    return [pair for _, pair in kept]


def _below(kept: Iterable[tuple[Tensor, Any]], largest: float) -> Iterator[tuple[Tensor, Any]]:
    """The samples whose numbers are not larger."""
    for numbers, pair in kept:
        own = (numbers <= largest).nonzero().flatten().tolist()
        if own:
            yield numbers[own], chosen((pair, {}), own, len(numbers))[0]
