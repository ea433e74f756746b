"""`WandbLogger.watch`, called before a fit, watches a network that the converted one replaces."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from lightning_da3.model.model import DA3Model

NAMES = "_wandb_hook_names"  # W&B's own list of what it watches, on the module that was given


def watching_runs(loggers: Iterable[Any]) -> list[Any]:
    """The W&B runs that may watch a network: of loggers, or the one that is there without.

    Args:
        loggers: W&B's loggers.
    """
    runs = {id(logger.experiment): logger.experiment for logger in loggers}
    if not runs and "wandb" in sys.modules:
        run = getattr(sys.modules["wandb"], "run", None)
        return [] if run is None else [run]
    return list(runs.values())


def watch_again(run: Any, pl_module: Any, model: DA3Model) -> None:
    """Watch what trains now, if the user had W&B watch the LightningModule or its network.

    Gradients and parameters are logged as often as the Trainer logs metrics: how often the user
    wanted them is not known.

    Args:
        run: W&B's run.
        pl_module: The LightningModule, with its network converted.
        model: The converted network.
    """
    watched = list(_watched(pl_module, model))
    kinds = {name.split("/")[0] for module in watched for name in vars(module)[NAMES]}
    kinds &= {"gradients", "parameters"}
    if not kinds:
        return
    run.unwatch()
    for module in watched:
        del vars(module)[NAMES]
    every = pl_module.trainer.log_every_n_steps
    log = "all" if len(kinds) > 1 else kinds.pop()
    run.watch(pl_module, log=log, log_freq=every, idx=0)


def _watched(pl_module: nn.Module, model: DA3Model) -> Iterator[nn.Module]:
    roots = [pl_module, model.original.network]
    modules = (module for root in roots if root is not None for module in root.modules())
    return (module for module in modules if NAMES in vars(module))
