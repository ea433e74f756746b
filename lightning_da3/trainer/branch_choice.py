"""Branches that domains skip, chosen by the training batches before the first step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_da3.budget.microbatches import samples_in
from lightning_da3.model.choosing import MOST_SAMPLES, BranchChoice
from lightning_da3.model.modes import in_use
from lightning_da3.trainer.asking import (
    check_automatic,
    is_fresh,
    loss_of_step,
    of_all_ranks,
    silent,
)
from lightning_da3.trainer.lightning_private import training_batches
from lightning_da3.trainer.session import TrainingSession
from lightning_da3.trainer.steps import domain_of

ASKED = 'GateConfig(by="domain")'
NEAR = 0.05  # of the network's FLOPs: what is left further below the target is said
INSTEAD = "model.choose_branches(domain, batches, target)"


def choose_branches(trainer: Any, pl_module: Any, session: TrainingSession) -> None:
    """Choose what domains skip that have learned nothing yet, if the config says so.

    Domains that skip something already keep to it. `training_step` is called for some batches of an
    epoch again and again, in eval, for its loss alone, as for `start_heads`.

    Args:
        trainer: About to train.
        pl_module: Its module.
        session: What is learned.

    Raises:
        ConfigError: The module's steps optimize by themselves, their batches cannot be seen, a
            domain has no linear head of its own, or the target cannot be reached.
        InputError: A loss does not depend on the head, or is not finite.
    """
    model = session.network
    gate = model.config.gate
    if gate is None or gate.by != "domain":
        return
    choices = {
        name: BranchChoice(model, name, gate.target, of_all_ranks)
        for name in session.domains
        if is_fresh(model.domain(name)) and not model.skipped(name)
    }
    if not choices:
        return
    check_automatic(pl_module, ASKED, INSTEAD)
    before = model.active_domain
    with torch.random.fork_rng(), silent(pl_module, model), in_use(pl_module), model.choosing():
        losses = _losses(trainer, pl_module, session, list(choices))
        try:
            for name, choice in choices.items():
                session.activate(name)
                choice.make(losses.pop(name))
        finally:
            session.activate(before)
    for name, choice in choices.items():
        session.skip(name, choice.skipped)
        left = model.plan.executed_share(choice.skipped)
        rank_zero_info(
            f"DA3: {name!r} skips {list(choice.skipped)}: {left:.0%} of the network's FLOPs are "
            "left."
        )
        if left < gate.target - NEAR:
            rank_zero_warn(
                f"DA3: {name!r} keeps {left:.0%} of the network's FLOPs, though {gate.target:.0%} "
                f"were asked for: single branches are so large. `GateConfig(target=...)` above "
                f"{gate.target:g} skips fewer."
            )


def _losses(
    trainer: Any, pl_module: Any, session: TrainingSession, domains: list[str]
) -> dict[str, list[Callable[[], Any]]]:
    """What computes the losses of batches of every domain, drawn from an epoch of them."""
    step, most = loss_of_step(trainer, pl_module), -(-MOST_SAMPLES // trainer.world_size)
    drawn: dict[str, list[tuple[float, int, Callable[[], Any]]]] = {name: [] for name in domains}
    numbers = Random(0)
    for index, each in enumerate(training_batches(trainer, ASKED, INSTEAD)):
        name, batch = domain_of(session, each)
        if name not in drawn:
            continue
        kept = drawn[name]
        kept.append((numbers.random(), samples_in(batch), partial(step, batch, index)))
        last = max(kept, key=lambda one: one[0])
        if sum(count for _, count, _ in kept) - last[1] >= most:
            kept.remove(last)
    return {name: [loss for *_, loss in kept] for name, kept in drawn.items()}
