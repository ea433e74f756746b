"""Names that both the user's network and a DA3Model have."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

from torch import nn

from lightning_da3.config import DA3Config
from lightning_da3.errors import DA3Error
from lightning_da3.model.views import has_name
from lightning_da3.nn.call import Calls


class BothConfigs(DA3Config):
    """A config that also answers what the config of the user's network would be asked."""

    def __getattr__(self, name: str) -> Any:
        """What the network's own config has of this name."""
        theirs = vars(self).get("theirs")
        if theirs is None or name.startswith("__"):
            raise AttributeError(f"'DA3Config' object has no attribute {name!r}")
        return getattr(theirs, name)

    def __eq__(self, other: object) -> bool:
        """Whether the choices for the conversion are the same."""
        return isinstance(other, DA3Config) and _choices(self) == _choices(other)

    def __hash__(self) -> int:
        """As of the choices for the conversion."""
        return hash(_choices(self))

    def __repr__(self) -> str:
        """The choices for the conversion."""
        return repr(_choices(self))


def _choices(config: DA3Config) -> DA3Config:
    if type(config) is DA3Config:
        return config
    return DA3Config(**{f.name: getattr(config, f.name) for f in dataclasses.fields(DA3Config)})


def with_own_config(config: DA3Config, network: nn.Module | None) -> DA3Config:
    """The config, which also answers for the `config` of the user's network if it has one."""
    theirs = None if network is None else vars(network).get("config")
    if theirs is None or isinstance(config, BothConfigs):
        return config
    both = BothConfigs(**vars(config))
    object.__setattr__(both, "theirs", theirs)
    return both


def guard_backbone_(backbone: nn.Module, network: nn.Module | None, calls: Calls) -> None:
    """Refuse direct calls of the rewritten network where the user's own has a `backbone`."""
    if network is not None and has_name(network, "backbone"):
        backbone.register_forward_pre_hook(partial(_refuse_unless_running, calls))


def _refuse_unless_running(calls: Calls, module: nn.Module, args: Any) -> None:
    del module, args
    if calls.here.call is None:
        raise DA3Error(
            "`backbone` of a DA3Model is all of the rewritten network. The part of your network of "
            "this name is `model.network.backbone`."
        )
