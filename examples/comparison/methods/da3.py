"""DA3: additive attention adapters and a head of the domain's own; gates on request."""

from __future__ import annotations

from functools import partial

import lightning as L
from torch import nn

from comparison.methods.plain import head_of
from lightning_da3 import DA3Callback, DA3Config, DA3Model, GateConfig, MemoryConfig, convert

DOMAIN = "learned"
DEFAULT = DA3Config()
GATED = DA3Config(gate=GateConfig())
EXACT = DA3Config(memory=MemoryConfig(exact=True))


def da3(network: nn.Module, config: DA3Config) -> DA3Model:
    """The network converted, with one domain that trains."""
    head = head_of(network)[1]
    classes = head.out_features if isinstance(head, nn.Linear) else head.out_channels
    model = convert(network, config)
    model.add_domain(DOMAIN, num_classes=classes)
    model.set_domain(DOMAIN)
    return model.train()


def callbacks(config: DA3Config) -> list[L.Callback]:
    """What tells gates, where there are any, how far training is."""
    return [DA3Callback(DOMAIN, config=config, predict=False)]


default = partial(da3, config=DEFAULT)
gated = partial(da3, config=GATED)
exact = partial(da3, config=EXACT)
