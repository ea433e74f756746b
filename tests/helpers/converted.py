"""Converted tiny networks."""

import pytest
import torch

from helpers import models
from helpers.comparing import (
    add,
    mix_gates_,
)
from lightning_da3 import (
    AdapterConfig,
    ConversionError,
    DA3Config,
    GateConfig,
    convert,
)


def choose(name="", **choices):
    """A config for tiny networks: adapters everywhere, small and with gates."""
    adapter = AdapterConfig(hidden_channels=4, max_cells=16, min_stride=1)
    head = None if name in models.WITHOUT_A_HEAD else "auto"
    return DA3Config(
        **{"adapter": adapter, "gate": GateConfig(target=0.5, by="cell"), "head": head, **choices}
    )


def network(name):
    return models.family(name) if name in models.FAMILIES else models.zoo(name)


def converted(name, dtype=torch.float32, **choices):
    model = add(convert(network(name).to(dtype), choose(name, **choices)), "a")
    model.set_domain("a")
    mix_gates_(model, models.inputs(name, dtype))
    return model.train()


def steps(name, **choices):
    plan = convert(network(name), choose(name, **choices)).plan
    return plan, {step.name: step for step in plan.nodes}


def refused(net, *parts, **choices):
    with pytest.raises(ConversionError) as caught:
        convert(net, choose(**choices))
    for part in parts:
        assert part in str(caught.value)
