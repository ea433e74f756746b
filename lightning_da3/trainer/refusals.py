"""What a run refuses, with the reason and the alternative."""

from __future__ import annotations

from typing import Any

from lightning_da3.errors import ConfigError
from lightning_da3.model.model import DA3Model
from lightning_da3.trainer.building import builds_later
from lightning_da3.trainer.finding import find_backbone
from lightning_da3.trainer.lightning_private import is_from_lightning, is_of_lightning

BACKBONE_OUT_OF_REACH = (
    "the backbone is frozen, folded into constants and left out of checkpoints: changes to it "
    "would be lost, and change what every other domain computes"
)
REFUSED_CALLBACKS = {
    "BaseFinetuning": f"It unfreezes the backbone; {BACKBONE_OUT_OF_REACH}.",
    "ModelPruning": f"It prunes the backbone; {BACKBONE_OUT_OF_REACH}.",
}
REFUSED_PRECISIONS = {
    "BitsandbytesPrecision": f"It replaces layers of the backbone; {BACKBONE_OUT_OF_REACH}.",
    "TransformerEnginePrecision": f"It replaces layers of the backbone; {BACKBONE_OUT_OF_REACH}.",
}


def check_converted_before(strategy: Any, pl_module: Any, backbone: str | None) -> None:
    """Refuse to convert in a started process: the main process would not get the domains.

    Raises:
        ConfigError: The network is not converted.
    """
    name = None if builds_later(pl_module) else find_backbone(pl_module, backbone)
    if name is None or not isinstance(pl_module.get_submodule(name), DA3Model):
        raise ConfigError(
            f"{type(strategy).__name__} trains copies of the LightningModule in processes that it "
            "starts, and the main process drops what it does not know: the domains would vanish. "
            'Use strategy="da3_ddp_spawn" or "da3_ddp_notebook" with a network made in __init__, '
            'which is converted before the processes start; or strategy="ddp".'
        )


def check_strategy(strategy: Any) -> None:
    """Refuse strategies that shard or replace the network.

    Raises:
        ConfigError: It is neither Lightning's single-device nor its DDP strategy, nor derived.
    """
    kinds = [kind for kind in type(strategy).__mro__ if is_from_lightning(kind)]
    if not kinds or kinds[0].__name__ not in ("SingleDeviceStrategy", "DDPStrategy"):
        raise ConfigError(
            f"{type(strategy).__name__} is not supported: it shards or replaces parameters, which "
            'the frozen backbone and its small domains do not need. Use strategy="da3" (one '
            'device) or strategy="da3_ddp" (several); plain "auto" and "ddp" with a DA3Callback '
            "do as well."
        )


def check_plugins(trainer: Any) -> None:
    """Refuse what would touch the backbone.

    Raises:
        ConfigError: A callback or the precision does; all are named, with the reason.
    """
    parts = [*trainer.callbacks, trainer.precision_plugin]
    refused = REFUSED_CALLBACKS | REFUSED_PRECISIONS
    problems = [
        f"{type(part).__name__} cannot be used with a domain. {reason}"
        for part in parts
        for kind, reason in refused.items()
        if is_of_lightning(part, kind)
    ]
    if problems:
        raise ConfigError(" ".join(problems))


def nothing_to_learn(model: DA3Model) -> str:
    """Why a loss depends on nothing that trains, in words."""
    active = model.active_domain
    if active is None:
        return (
            "The loss depends on nothing that trains: no domain is active, so that the frozen "
            "backbone computes alone. Leave the active domain to the DA3Callback, or call "
            f"`set_domain(name)` with one of {model.domains} before the forward pass."
        )
    return (
        f"The loss depends on nothing that trains, though domain {active!r} is active: the "
        "training step leaves the network out, detaches its output, or runs inside "
        "`torch.no_grad()`."
    )
