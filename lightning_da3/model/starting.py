"""Where a domain's head starts: not at random, but where its samples say."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_da3.errors import ConfigError, InputError
from lightning_da3.model.modes import in_use
from lightning_da3.model.running import Running
from lightning_da3.nn.head import Head
from lightning_da3.nn.ridge import Ridge
from lightning_da3.torch_private.trees import tree_map_only


class StartsHeads(Running):
    """What starts the heads of domains. Everything is an attribute of `DA3Model`; see there."""

    def start_head(
        self,
        name: str,
        batches: Iterable[Any],
        loss: Callable[[Any, Any], Tensor] = F.cross_entropy,
    ) -> None:
        """Give a domain's head weights that already tell its samples apart, before training.

        One pass over the samples, forward only, in closed form: a ridge regression of what the
        loss asks of scores that are all zero, its negative gradient (of cross-entropy: the class
        minus a uniform guess), from the features that the head reads. It is the first step of
        gradient boosting (Friedman, "Greedy Function Approximation: A Gradient Boosting Machine",
        2001), short enough for adapters to learn on from there. What the head was is lost. Kept
        are sums of D x D numbers for D features; memory does not grow with the samples.

        Args:
            name: One of `domains`.
            batches: Its samples: tuples or lists of what `forward` takes first and of what `loss`
                takes second, as loaders give them.
            loss: Of the network's output and a batch's second entry; a mean, as
                `torch.nn.functional` has them by default.

        Raises:
            DomainError: There is no such domain.
            ConfigError: `batches` are none, or the domain has no linear head of its own.
            InputError: A batch is no pair, does not fit the network, or its loss does not depend
                on the head; or there are no samples, or figures that are not finite.
        """
        if not isinstance(batches, Iterable):
            raise ConfigError(
                f"`batches` must be a list or a loader of batches, got {type(batches).__name__}."
            )
        start = HeadStart(self.domain(name).head, name)
        with self._as_in_use(name):
            for batch in batches:
                start.see(partial(self._loss_of, batch, loss))
        start.finish()

    @contextmanager
    def _as_in_use(self, name: str) -> Iterator[None]:
        """A domain is active, in eval, without gradients; all is as it was afterwards."""
        before = self.active_domain
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices), in_use(self):
            try:
                self.set_domain(name)
                yield
            finally:
                self.set_domain(before)

    def _loss_of(self, batch: Any, loss: Callable[[Any, Any], Tensor]) -> Tensor:
        if not isinstance(batch, (list, tuple)) or len(batch) < 2:
            raise InputError(
                f"`batches` must be pairs of samples and targets, got a {type(batch).__name__}."
            )
        x, target = tree_map_only(Tensor, lambda value: value.to(self._device), list(batch[:2]))
        return loss(self(x), target)


class HeadStart:
    """Gathers what a domain's samples ask of its head, and starts it there; see `start_head`.

    Args:
        head: The domain's.
        name: The domain's, for errors.

    Raises:
        ConfigError: There is no head that could start elsewhere.
    """

    def __init__(self, head: nn.Module | None, name: str) -> None:
        self._name, self._head = name, linear_head(head, name)
        self._ridge = Ridge(centred=self._head.bias is not None)

    def see(self, computes: Callable[[], Any]) -> None:
        """Take the samples of one batch.

        Args:
            computes: Calls the network, whose domain is active, and gives the loss of its output: a
                mean over samples.

        Raises:
            InputError: The loss does not depend on the head.
        """
        for features, asked in asked_of(self._head, computes, self._name):
            self._ridge.add(features.flatten(0, -2), asked.flatten(0, -2))

    def finish(self, others: Callable[[Ridge], Ridge] = lambda ridge: ridge) -> None:
        """Start the head.

        Args:
            others: Adds what other processes gathered.

        Raises:
            InputError: There were no samples, or figures that are not finite.
        """
        ridge = others(self._ridge)
        if not ridge.count:
            raise InputError(f"The head of {self._name!r} starts from samples; there were none.")
        if not ridge.is_finite():
            raise InputError(
                f"The head of {self._name!r} cannot start: some features, or gradients of the "
                "loss, are not finite. Look for such values in the batches."
            )
        weight, bias = ridge.solve()
        with torch.no_grad():
            self._head.weight.copy_(weight.view_as(self._head.weight))
            if self._head.bias is not None:
                self._head.bias.copy_(bias)


def linear_head(head: nn.Module | None, name: str) -> Head:
    """The head, which maps every position alone.

    Raises:
        ConfigError: There is none, or it reads more than a position.
    """
    if head is None:
        raise ConfigError(f"Domain {name!r} has no head of its own that could start elsewhere.")
    alone = isinstance(head, nn.Linear) or (
        {*head.kernel_size, *head.stride} == {1} and {*head.padding} == {0}  # type: ignore[misc]
    )
    if not alone:
        raise ConfigError(
            f"The head of {name!r} is a {type(head).__name__} that reads several positions at "
            "once; only linear layers and convolutions of single pixels can start elsewhere."
        )
    return cast(Head, head)


def asked_of(head: Head, computes: Callable[[], Any], name: str) -> Iterator[tuple[Tensor, Tensor]]:
    """What a head reads, (N, *in, D), and what the loss asks of scores that are all zero, (.., K).

    Args:
        head: The head.
        computes: Calls the network, whose domain is active, and gives the loss of its output: a
            mean over samples.
        name: The domain's, for errors.

    Raises:
        InputError: The loss does not depend on the head.
    """
    read: list[tuple[Tensor, Tensor]] = []

    def silent(_: nn.Module, inputs: Any, scores: Tensor) -> Tensor:
        torch.set_grad_enabled(True)  # for what follows; the call began without
        read.append((inputs[0].detach(), torch.zeros_like(scores).requires_grad_()))
        return read[-1][1]

    handle = head.register_forward_hook(silent)
    try:
        with torch.no_grad():
            value = computes()
    finally:
        handle.remove()
    if not isinstance(value, Tensor) or not value.requires_grad:
        raise InputError(
            f"The loss of {name!r} does not depend on the domain's head. Give one that takes the "
            "network's output and a batch's second entry."
        )
    zeros = [scores for _, scores in read]
    asked = torch.autograd.grad(value, zeros, torch.ones_like(value))
    axis = -1 if isinstance(head, nn.Linear) else 1
    count = sum(scores.numel() // scores.shape[axis] for scores in zeros)
    for (features, _), gradient in zip(read, asked, strict=True):
        yield features.movedim(axis, -1), gradient.movedim(axis, -1) * -count
