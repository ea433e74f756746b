"""What a step of every method costs, and what using what it learned does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from measure import Step, alternate, costs
from torch import Tensor, nn

from comparison.backbones import load_backbone
from comparison.methods import METHODS
from comparison.methods.da3 import DOMAIN
from comparison.training import load_, ready
from lightning_da3 import DA3Model

ANY_RATE = 1e-4  # costs do not depend on it


def measure(
    network: tuple[str, Path | None, int],
    states: dict[str, tuple[Path, Sequence[str]] | None],
    classes: int,
    batch_size: int,
    rounds: int,
) -> dict[str, dict[str, float]]:
    """Costs by method, on random images; times taken in turns, in channels_last.

    Args:
        network: Name, weights and image size, as `load_backbone` takes them.
        states: Of every method to measure, a file of the state of a domain that it learned, and
            what that skips; None: with a fresh domain. Training starts from a fresh one that skips
            the same.
        classes: Of that domain.
        batch_size: Images of a step.
        rounds: Timed steps of every method.
    """
    torch.manual_seed(0)
    backbone = load_backbone(*network)
    size = network[2]
    images = torch.randn(batch_size, 3, size, size).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(batch_size) % classes

    def build(name: str) -> nn.Module:
        built = METHODS[name].build(backbone.with_head(classes))
        return built.to(memory_format=torch.channels_last)

    steps = {}
    for name, state in states.items():
        model = build(name)
        if isinstance(model, DA3Model) and state is not None:
            model.skip(DOMAIN, state[1])
        make = METHODS[name].optimizer
        steps[name] = Step(
            model, images, labels, lambda _, model=model, make=make: make(model, ANY_RATE)
        )
    paid = costs(steps, rounds)
    users = {name: _user(name, steps[name].network, s, images) for name, s in states.items()}
    used = alternate(users, rounds)
    return {
        name: {
            "kept_bytes": paid[name].saved_bytes,
            "peak_bytes": paid[name].peak_bytes,
            "step_ms": paid[name].time_ms,
            "step_flops": paid[name].flops,
            "inference_ms": used[name].wall_ms,
        }
        for name in states
    }


def _user(
    name: str, network: nn.Module, state: tuple[Path, Sequence[str]] | None, images: Tensor
) -> Any:
    """Runs the network as it is used, once a call."""
    if state is not None and state[0].exists():
        load_(network, *state)
    network = METHODS[name].merge(ready(network))

    @torch.no_grad()
    def use() -> Tensor:
        return network(images)

    return use
