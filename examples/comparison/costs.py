"""What a step of every method costs, and what using what it learned does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from measure import Step, alternate, costs
from torch import Tensor, nn

from comparison.backbones import load_backbone
from comparison.methods import METHODS
from comparison.training import ready

ANY_RATE = 1e-4  # costs do not depend on it


def measure(
    network: tuple[str, Path | None, int],
    states: dict[str, Path | None],
    classes: int,
    batch_size: int,
    rounds: int,
) -> dict[str, dict[str, float]]:
    """Costs by method, on random images; times taken in turns, in channels_last.

    Args:
        network: Name, weights and image size, as `load_backbone` takes them.
        states: Of every method to measure, a file of the state of a domain that it learned, with
            which inference is timed; None: with a fresh domain.
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
    for name in states:
        model = build(name)
        make = METHODS[name].optimizer
        steps[name] = Step(
            model, images, labels, lambda _, model=model, make=make: make(model, ANY_RATE)
        )
    paid = costs(steps, rounds)
    users = {name: _user(name, steps[name].network, path, images) for name, path in states.items()}
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


def _user(name: str, network: nn.Module, path: Path | None, images: Tensor) -> Any:
    """Runs the network as it is used, once a call."""
    if path is not None and path.exists():
        network.load_state_dict(torch.load(path, weights_only=True), strict=False)
    network = METHODS[name].merge(ready(network))

    @torch.no_grad()
    def use() -> Tensor:
        return network(images)

    return use
