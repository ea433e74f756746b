"""``plan`` and ``verify``: what a conversion costs, and whether it computes the same."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_da3.cli.networks import factory_of, made, network_without_values
from lightning_da3.config import AdapterConfig, DA3Config, GateConfig, MemoryConfig
from lightning_da3.converting import compared, convert
from lightning_da3.costs.steps import step_costs
from lightning_da3.errors import ConfigError
from lightning_da3.layers import CONVS
from lightning_da3.plotting.memory import plot_step


def verify(given: argparse.Namespace) -> tuple[str, int]:
    """Every comparison, and 1 if anything differs. Weights are random, the same each time."""
    torch.manual_seed(0)
    network = made(factory_of(given.network), given.network)
    examples = None if given.image_size is None else _images(network, given.image_size)
    model, found = compared(network, _config(given), examples)
    width = max((len(c.name) for c in found), default=0)
    lines = [model.plan.headline]
    for c in found:
        how = c.note or f"{c.difference:.2g} of at most {c.tolerance:.2g}"
        lines.append(f"{c.name:<{width}}  {'ok' if c.ok else 'differs':<7}  {how}")
    return "\n".join(lines), int(not all(c.ok for c in found))


def _images(network: nn.Module, sides: Sequence[int]) -> Tensor:
    """Two images of a size that a network should be compared on."""
    first = next((m for m in network.modules() if isinstance(m, CONVS)), None)
    axes = 0 if first is None else first.weight.dim() - 2
    if first is None or len(sides) not in (1, axes) or min(sides) < 1:
        raise ConfigError(
            f"`--image-size` must be one positive number or one for each spatial axis of what the "
            f"network's first convolution takes, got {[*sides]}; without convolution, leave it out."
        )
    size = [*sides] * (axes // len(sides))
    return torch.randn(2, first.in_channels, *size, dtype=first.weight.dtype)


def _config(given: argparse.Namespace, **memory: Any) -> DA3Config:
    """The config that options say."""
    options: dict[str, Any] = {}
    chosen = {name: getattr(given, name) for name in ("min_stride", "min_depth")}
    where: dict[str, Any] = {k: _number(text) for k, text in chosen.items() if text is not None}
    if where:
        options["adapter"] = AdapterConfig(**where)
    return DA3Config(
        gate=GateConfig(target=0.5, by="cell") if given.gates else None,
        memory=MemoryConfig(exact=given.exact, weights=given.weights, **memory),
        head=None if given.head.lower() == "none" else str(given.head),
        **options,
    )


def _number(text: str) -> int | float | str:
    """The number that a text is, if it is one."""
    if re.fullmatch("[0-9]{1,9}", text):
        return int(text)
    return float(text) if re.fullmatch(r"[0-9]*\.[0-9]{1,9}", text) else text


def plan(given: argparse.Namespace) -> tuple[str, int]:
    """What a step costs, for people or as JSON."""
    _check_plot(given.plot)
    network = network_without_values(factory_of(given.network), given.network)
    digits = re.fullmatch("[0-9]{1,19}", given.budget or "")
    budget = int(given.budget) if digits else given.budget
    if given.split is not None and budget is None:
        raise ConfigError("`--split` says how a budget is held: give `--budget` as well.")
    model = convert(network, _config(given, budget=budget, split=given.split or "pieces"))
    costs = step_costs(model, given.batch_size, given.image_size, num_classes=given.num_classes)
    if given.plot is not None:
        figure = plot_step(costs.ours, costs.finetune, title=_title(given.network, costs.inputs))
        try:
            figure.savefig(given.plot)
        except (OSError, ValueError) as error:  # ValueError: an ending it has no format for
            raise ConfigError(f"--plot: cannot write {given.plot!r}: {error}") from error
    text = str(costs) if given.nodes else f"{costs.summary}\n`--nodes` lists every node."
    return json.dumps(costs.to_dict(), indent=1) if given.format == "json" else text, 0


def _check_plot(plot: str | None) -> None:
    """Refuse a picture that cannot be written before anything is computed for it."""
    if plot is None:
        return
    if not plot.strip() or Path(plot).is_dir():
        raise ConfigError(f"--plot: {plot!r} is no file. Give the name of one, such as plan.png.")
    folder = Path(plot).resolve().parent
    if not folder.is_dir():
        raise ConfigError(f"--plot: there is no folder {str(folder)!r}.")


def _title(name: str, inputs: Sequence[Sequence[int]]) -> str:
    shapes = ", ".join(" x ".join(map(str, shape)) for shape in inputs)
    return f"Memory over one training step of {name}, {shapes}"
