"""``export``: a domain as a file that needs no Python."""

from __future__ import annotations

import argparse
import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_da3.cli.networks import factory_of, found_at, made
from lightning_da3.config import DA3Config
from lightning_da3.converting import convert
from lightning_da3.costs.inputs import inputs_for
from lightning_da3.errors import ConfigError
from lightning_da3.exporting.manifest import SUFFIX
from lightning_da3.exporting.training import LOSSES
from lightning_da3.exporting.writing import check_format, check_target
from lightning_da3.files.domain_file import read_domain
from lightning_da3.formatting import format_bytes
from lightning_da3.model.model import DA3Model

FRESH = "new"  # the name of a domain that has no file


def export(given: argparse.Namespace) -> tuple[str, int]:
    """Write what options say; returns a line that says what was written."""
    _check(given)
    check_format(given.format, given.batch_size is None)
    check_target(given.output)
    config = None if given.domain is None else read_domain(given.domain).metadata.get("config")
    torch.manual_seed(0)
    model = convert(_network(given.network, given.state), DA3Config.of(config), verify=False)
    name = _domain(model, given)
    options: dict[str, Any] = {"format": given.format, "dynamic_batch": given.batch_size is None}
    inputs = _inputs(model, given)
    if name is not None and given.training:
        loss = found_at(given.loss) if ":" in given.loss else given.loss
        options |= {"loss": loss, "optimizer": given.optimizer, "accumulate": given.accumulate}
        path = model.export_training(name, given.output, inputs, **options)
    else:
        path = model.export(name, given.output, inputs, domains=given.domains, **options)
    return _said(path), 0


def _check(given: argparse.Namespace) -> None:
    """Refuse options that contradict each other, before there is work to lose."""
    if given.domain is not None and given.num_classes is not None:
        raise ConfigError("`--num-classes` is of a fresh domain, and `--domain` of one that is.")
    if given.training and given.domain is None and given.num_classes is None:
        raise ConfigError(
            "A training step learns a domain: give its file, `--domain FILE`, or begin a fresh "
            "one, `--num-classes N`."
        )
    if given.training and given.domains != "inside":
        raise ConfigError("`--domains` is of inference: a training step takes its domain as input.")
    trains = given.loss != "cross_entropy" or given.optimizer != "sgd" or given.accumulate
    if trains and not given.training:
        raise ConfigError("`--loss`, `--optimizer` and `--accumulate` need `--training`.")
    if ":" not in given.loss and given.loss not in LOSSES:
        raise ConfigError(
            f"`--loss` must be one of {list(LOSSES)} or module:function, got {given.loss!r}."
        )
    if given.state is None and ":" not in given.network:
        raise ConfigError(
            f"{given.network!r} has random weights here. Give those that its domains were learned "
            "on, `--state FILE`, or a factory of your own that loads them, `module:factory`."
        )


def _network(name: str, state: str | None) -> nn.Module:
    network = made(factory_of(name), name)
    if state is not None:
        try:
            network.load_state_dict(_read(Path(state)))
        except RuntimeError as error:  # of other names or shapes
            raise ConfigError(f"--state: {state!r} does not fit {name!r}: {error}") from error
    return network.eval()


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ConfigError(f"--state: cannot read {str(path)!r}: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"--state: {str(path)!r} holds no state dict.")
    return found


def _domain(model: DA3Model, given: argparse.Namespace) -> str | None:
    """The name of the domain that goes out, if it is not the backbone alone."""
    if given.domain is not None:
        return model.load_domain(given.domain)
    if given.num_classes is None:
        return None
    model.add_domain(FRESH, num_classes=given.num_classes)
    return FRESH


def _inputs(model: DA3Model, given: argparse.Namespace) -> tuple[Tensor, ...]:
    count = 2 if given.batch_size is None else given.batch_size
    found = next(inputs_for(model, count, given.image_size), None)
    if found is None:
        raise ConfigError(
            f"What {given.network!r} takes cannot be guessed: use `model.export` from Python."
        )
    return tuple(
        torch.randn(x.shape, dtype=x.dtype)
        if x.is_floating_point()
        else torch.zeros(x.shape, dtype=x.dtype)
        for x in found
    )


def _said(path: Path) -> str:
    about = json.loads(Path(f"{path}{SUFFIX}").read_text(encoding="utf-8"))
    what = "the backbone alone" if about["domain"] is None else f"the domain {about['domain']!r}"
    image = about["inputs"][0]
    return (
        f"{path}: {about['kind']} of {what}, {format_bytes(path.stat().st_size)}, takes "
        f"{image['name']} {image['shape']} and {len(about['inputs']) - 1} more."
    )
