"""A checkpoint loaded by a Trainer: what it must hold, and what is taken from it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lightning_da3.errors import CheckpointError
from lightning_da3.files.reading import check_readable
from lightning_da3.model.state import checked_extra
from lightning_da3.trainer.attaching import check_checkpoint, domains_in, load_state_


def state_key(domains: Iterable[str]) -> str:
    """The name of a callback's state, which tells the callbacks of one checkpoint apart."""
    return f"DA3Callback[{', '.join(domains)}]"


def read_checkpoint(read: Callable[..., Any], path: Any, *args: Any, **kwargs: Any) -> Any:
    """What a strategy reads for a Trainer, if it is a checkpoint.

    Args:
        read: The strategy's own ``load_checkpoint``.
        path: As the Trainer was given it.
        args: As `read` takes them.
        kwargs: As `read` takes them.

    Raises:
        CheckpointError: It is not.
    """
    if os.path.lexists(path):  # else it is of another file system, or missing, as Lightning says
        check_readable(path, "checkpoint")
    checkpoint = read(path, *args, **kwargs)
    check_checkpoint(checkpoint)
    return checkpoint


def load_checkpoint_(
    pl_module: Any, checkpoint: dict[str, Any], strict: bool, domains: Iterable[str]
) -> None:
    """Load the weights of a checkpoint, strictly where it matters.

    From a checkpoint of before the conversion, training takes the weights and starts anew.

    Args:
        pl_module: The LightningModule, with its network converted.
        checkpoint: As Lightning read it; edited if training starts anew.
        strict: Whether keys outside the network must match, too.
        domains: Names of the domains that the run learns or evaluates.

    Raises:
        CheckpointError: It holds other domains, or does not fit.
    """
    fitting = pl_module.trainer.state.fn == "fit"
    state = checkpoint["state_dict"]
    saved = domains_in(state)
    _check_domains(saved, domains)
    if fitting:
        _check_trained(checkpoint, state_key(domains))
    if fitting and not saved:
        _forget_training_(checkpoint)
    load_state_(pl_module, state, strict, type(pl_module).load_state_dict)


def _check_domains(saved: Mapping[str, Any], domains: Iterable[str]) -> None:
    for said in saved.values():
        extra = checked_extra(said)
        lacking = [domain for domain in domains if domain not in extra["num_classes"]]
        if lacking:
            raise CheckpointError(
                f"The checkpoint holds the domains {list(extra['num_classes'])} and not "
                f"{lacking}. Give the callback a domain that it holds; to learn a new one "
                "beside them, `load_from_checkpoint` first and `fit` without `ckpt_path`."
            )


def _check_trained(checkpoint: Mapping[str, Any], key: str) -> None:
    theirs = [name for name in checkpoint.get("callbacks", ()) if name.startswith("DA3Callback[")]
    if theirs and key not in theirs:
        raise CheckpointError(
            f"The checkpoint was written while {theirs} trained, and this run trains {key}: its "
            "optimizer states are of other parameters. Resume with the domains that it trained, "
            "or `load_from_checkpoint` and `fit` without `ckpt_path`."
        )


def _forget_training_(checkpoint: dict[str, Any]) -> None:
    """Leave a Trainer nothing to restore but the weights."""
    for key in ("loops", "callbacks"):
        checkpoint.pop(key, None)
    checkpoint.update(optimizer_states=[], lr_schedulers=[])
