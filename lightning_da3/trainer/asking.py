"""Training steps that are asked for their loss alone, before training begins."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import reduce
from operator import add
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_da3.errors import ConfigError
from lightning_da3.model.domain import Domain
from lightning_da3.nn.adapter import Adapter
from lightning_da3.nn.ridge import Ridge


def is_fresh(domain: Domain) -> bool:
    """Whether adapters add nothing yet, as those that were never trained."""
    last = [cast(Adapter, adapter).value for adapter in domain.adapters.values()]
    return not any(bool(p.any()) for layer in last for p in layer.parameters())


def check_automatic(pl_module: Any, asked: str, instead: str) -> None:
    """Refuse steps that optimize by themselves.

    Args:
        pl_module: The LightningModule.
        asked: What needs the loss.
        instead: What to call instead.

    Raises:
        ConfigError: They do.
    """
    if not pl_module.automatic_optimization:
        raise ConfigError(
            f"{asked} needs the loss of `training_step`, which with automatic_optimization=False "
            f"optimizes by itself. Call `{instead}` yourself."
        )


def loss_of_step(trainer: Any, pl_module: Any) -> Callable[[Any, int], Tensor | None]:
    """What gives the loss of `training_step` for a batch and its index."""
    takes_index = len(inspect.signature(pl_module.training_step).parameters) > 1

    def step(batch: Any, index: int) -> Any:
        args = (batch, index) if takes_index else (batch,)
        with trainer.precision_plugin.train_step_context(), _uncompiled():
            output = pl_module.training_step(*args)
        return output.get("loss") if isinstance(output, dict) else output

    return step


def _uncompiled() -> Any:
    return torch.compiler.set_stance("force_eager")


def of_all_ranks(ridge: Ridge) -> Ridge:
    """The sums of all ranks. A collective: every rank must call it."""
    if not (dist.is_available() and dist.is_initialized()):
        return ridge
    found = [ridge] * dist.get_world_size()
    dist.all_gather_object(found, ridge)
    return reduce(add, found)


@contextmanager
def silent(pl_module: nn.Module, model: nn.Module) -> Iterator[None]:
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
