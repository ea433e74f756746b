"""Heads that start where the training batches say: a pass over them before the first step."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info

from lightning_da3.model.modes import in_use
from lightning_da3.model.starting import HeadStart
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

ASKED, INSTEAD = "DA3Callback(start_head=True)", "model.start_head(domain, batches)"


def start_heads(trainer: Any, pl_module: Any, session: TrainingSession) -> None:
    """Start the heads of domains that have learned nothing yet; others are left as they are.

    `training_step` is called once for every batch of an epoch, in eval, for its loss alone: what it
    logs is lost, and metrics and buffers beside the network are as before. The batches may come
    in another order in the first epoch than without.

    Args:
        trainer: About to train.
        pl_module: Its module.
        session: What is learned.

    Raises:
        ConfigError: The module's steps optimize by themselves, their batches cannot be seen, or
            a domain has no head that can start.
        InputError: A loss does not depend on the head, or is not finite.
    """
    model = session.network
    fresh = {name: model.domain(name) for name in session.domains}
    starts = {
        name: HeadStart(domain.head, name) for name, domain in fresh.items() if is_fresh(domain)
    }
    if not starts:
        return
    check_automatic(pl_module, ASKED, INSTEAD)
    before = model.active_domain
    with torch.random.fork_rng(), silent(pl_module, model), in_use(pl_module):
        step = loss_of_step(trainer, pl_module)
        try:
            for index, batch in enumerate(training_batches(trainer, ASKED, INSTEAD)):
                name, batch = domain_of(session, batch)
                if name in starts:
                    session.activate(name)
                    starts[name].see(partial(step, batch, index))
        finally:
            session.activate(before)
    for start in starts.values():
        start.finish(of_all_ranks)
    rank_zero_info(f"DA3: the heads of {list(starts)} start from their training batches.")
