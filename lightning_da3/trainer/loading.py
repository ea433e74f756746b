"""A checkpoint loaded by a Trainer: what it must hold, and what is taken from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning_da3.errors import CheckpointError
from lightning_da3.model.state import checked_extra
from lightning_da3.trainer.attaching import domains_in, load_state_


def state_key(domains: Iterable[str]) -> str:
    """The name of a callback's state, which tells the callbacks of one checkpoint apart."""
    return f"DA3Callback[{', '.join(domains)}]"


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
    state = _state_of(checkpoint)
    saved = domains_in(state)
    _check_domains(saved, domains)
    if fitting:
        _check_trained(checkpoint, state_key(domains))
    if fitting and not saved:
        _forget_training_(checkpoint)
    load_state_(pl_module, state, strict, type(pl_module).load_state_dict)


def _state_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    state = checkpoint.get("state_dict")
    if not isinstance(state, dict) or not state or not all(isinstance(key, str) for key in state):
        raise CheckpointError(
            "The checkpoint has no weights: its `state_dict` must be a dict of tensors by name, it "
            f"is {str(state)[:100]!r}. Give another one."
        )
    return state


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
    names = [str(name) for name in checkpoint.get("callbacks") or ()]
    theirs = [name for name in names if name.startswith("DA3Callback[")]
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
