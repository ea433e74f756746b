"""DA3: additive attention adapters and a head of the domain's own; gates and skips on request."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning as L
from torch import nn

from comparison.methods.plain import head_of
from lightning_da3 import DA3Callback, DA3Config, DA3Model, GateConfig, MemoryConfig, convert

DOMAIN = "learned"
DEFAULT = DA3Config()
GATED = DA3Config(gate=GateConfig(target=0.5, by="cell"))
EXACT = DA3Config(memory=MemoryConfig(exact=True))


def da3(network: nn.Module, config: DA3Config) -> DA3Model:
    """The network converted, with one domain that trains."""
    head = head_of(network)[1]
    classes = head.out_features if isinstance(head, nn.Linear) else head.out_channels
    model = convert(network, config)
    model.add_domain(DOMAIN, num_classes=classes)
    model.set_domain(DOMAIN)
    return model.train()


def skipping(target: float) -> DA3Config:
    """Domains skip residual branches until such a share of the network's FLOPs is left."""
    return DA3Config(gate=GateConfig(by="domain", target=target))


def prepare(model: DA3Model, batches: Iterable[Any]) -> None:
    """What the domain takes from its samples before the first step: what it skips, and a head."""
    gate = model.config.gate
    if gate is not None and gate.by == "domain":
        model.choose_branches(DOMAIN, batches, gate.target)
    model.start_head(DOMAIN, batches)


def callbacks(config: DA3Config) -> list[L.Callback]:
    """What tells gates, where there are any, how far training is."""
    return [DA3Callback(DOMAIN, config=config, predict=False)]
