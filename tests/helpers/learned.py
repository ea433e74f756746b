"""Converted networks with domains that have learned something, for tests of models."""

import torch

from helpers import models
from helpers.comparing import assert_identical
from helpers.domains import shake_
from lightning_da3 import AdapterConfig, DA3Config, GateConfig, convert

ADAPTER = AdapterConfig(hidden_channels=4, max_cells=16, min_stride=1)
CONFIG = DA3Config(adapter=ADAPTER, gate=GateConfig(target=0.5, by="cell"))


def converted(*domains, name="Residual", config=CONFIG):
    """A network with domains that have learned something: random parameters."""
    model = convert(models.zoo(name), config)
    for domain in domains:
        model.add_domain(domain, None if config.head is None else 3)
        shake_(model, domain)
    return model


def batch(name="Residual"):
    return models.inputs(name)[0]


@torch.no_grad()
def outputs(model, domain):
    model.set_domain(domain)
    return model(batch())


def assert_same_domains(model, other, names=(None, "a", "b")):
    for name in names:
        assert_identical(outputs(model, name), outputs(other, name))


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}
