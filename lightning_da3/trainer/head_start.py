"""Heads that start where the training batches say: a pass over them before the first step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial, reduce
from operator import add
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_da3.errors import ConfigError
from lightning_da3.model.domain import Domain
from lightning_da3.model.modes import in_use
from lightning_da3.model.starting import HeadStart
from lightning_da3.nn.adapter import Adapter
from lightning_da3.nn.ridge import Ridge
from lightning_da3.trainer.lightning_private import training_batches
from lightning_da3.trainer.session import TrainingSession
from lightning_da3.trainer.steps import domain_of


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
    if not pl_module.automatic_optimization:
        raise ConfigError(
            "DA3Callback(start_head=True) needs the loss of `training_step`, which with "
            "automatic_optimization=False optimizes by itself. Call "
            "`model.start_head(domain, batches)` yourself."
        )
    before = model.active_domain
    with torch.random.fork_rng(), _silent(pl_module, model), in_use(pl_module):
        step = _step(trainer, pl_module)
        try:
            for index, batch in enumerate(training_batches(trainer)):
                name, batch = domain_of(session, batch)
                if name in starts:
                    session.activate(name)
                    starts[name].see(partial(step, batch, index))
        finally:
            session.activate(before)
    for start in starts.values():
        start.finish(_of_all_ranks)
    rank_zero_info(f"DA3: the heads of {list(starts)} start from their training batches.")


def is_fresh(domain: Domain) -> bool:
    """Whether adapters add nothing yet, as those that were never trained."""
    last = [cast(Adapter, adapter).value for adapter in domain.adapters.values()]
    return not any(bool(p.any()) for layer in last for p in layer.parameters())


def _step(trainer: Any, pl_module: Any) -> Callable[[Any, int], Tensor | None]:
    takes_index = len(inspect.signature(pl_module.training_step).parameters) > 1

    def step(batch: Any, index: int) -> Any:
        args = (batch, index) if takes_index else (batch,)
        with trainer.precision_plugin.train_step_context(), _uncompiled():
            output = pl_module.training_step(*args)
        return output.get("loss") if isinstance(output, dict) else output

    return step


def _uncompiled() -> Any:
    return torch.compiler.set_stance("force_eager")


def _of_all_ranks(ridge: Ridge) -> Ridge:
    if not (dist.is_available() and dist.is_initialized()):
        return ridge
    found = [ridge] * dist.get_world_size()
    dist.all_gather_object(found, ridge)
    return reduce(add, found)


@contextmanager
def _silent(pl_module: nn.Module, model: nn.Module) -> Iterator[None]:
    """Nothing that a step logs or counts beside the network in the block stays."""
    metrics = [m for m in pl_module.modules() if isinstance(_state(m), dict)]
    counts = [_counts_of(metric) for metric in metrics]
    inside = {*model.buffers()}
    buffers = [(buffer, buffer.clone()) for buffer in pl_module.buffers() if buffer not in inside]
    attributes = vars(pl_module)
    own = {name: attributes[name] for name in _LOGS if name in attributes}
    attributes.update(dict.fromkeys(_LOGS, _nothing))
    try:
        yield
    finally:
        for name in _LOGS:
            del attributes[name]
        attributes.update(own)
        for metric, count in zip(metrics, counts, strict=True):
            vars(metric).update(count)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


_LOGS = ("log", "log_dict")


def _state(module: nn.Module) -> Any:
    """What a metric has gathered; None of other modules: torchmetrics is not imported here."""
    return getattr(module, "metric_state", None)


def _counts_of(metric: nn.Module) -> dict[str, Any]:
    names = {*_state(metric), "_update_count", "_computed", "_forward_cache"}
    return {name: deepcopy(value) for name, value in vars(metric).items() if name in names}


def _nothing(*args: Any, **kwargs: Any) -> None:
    del args, kwargs
