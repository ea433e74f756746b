"""DA3: additive attention adapters, gates and a head of the domain's own."""

from __future__ import annotations

from functools import partial

import lightning as L
from torch import nn

from comparison.methods.plain import head_of
from lightning_da3 import DA3Callback, DA3Config, DA3Model, MemoryConfig, convert

DOMAIN = "learned"
DEFAULT = DA3Config()
WITHOUT_GATES = DA3Config(gate=None)
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
    """What tells the gates how far training is."""
    return [DA3Callback(DOMAIN, config=config, predict=False)]


default = partial(da3, config=DEFAULT)
without_gates = partial(da3, config=WITHOUT_GATES)
exact = partial(da3, config=EXACT)
