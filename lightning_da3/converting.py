"""``convert``: trace, plan, rewrite."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from lightning_da3.config import DA3Config
from lightning_da3.errors import ConfigError, ConversionError, DA3Error
from lightning_da3.files.domain_file import fingerprint
from lightning_da3.memory import fake_mode_of
from lightning_da3.model.identity import architecture, backbone_state, former_identity
from lightning_da3.model.model import DA3Model
from lightning_da3.model.original import Original
from lightning_da3.passes.rewriting import rewrite
from lightning_da3.planning.planner import make_plan
from lightning_da3.tracing.islands import trace

NO_FINGERPRINT = "0" * 64


def convert(
    backbone: nn.Module,
    config: DA3Config | Mapping[str, Any] | None = None,
    example_inputs: Any = None,
) -> DA3Model:
    """Turn a pretrained network into one that learns domains in little memory.

    The copy is frozen and held in eval, batch norm is folded, every layer is replaced by one that
    keeps as little as the exact gradient allows, and every host gets a place for adapters.

    Args:
        backbone: Any network that `torch.fx` can trace; left unchanged.
        config: Choices, or a dict of them as YAML gives it; the defaults are good.
        example_inputs: A tensor or a tuple of the network's arguments. If given, their shapes
            decide what is computed again, instead of guessed ones; and the converted network is
            run once on them and must reproduce the backbone, which finds unusual networks before
            training does.

    Returns:
        A `DA3Model` without domains, which computes what `backbone` computes in eval.

    Raises:
        ConversionError: The network cannot be traced, has nothing to adapt, is converted already,
            or its classifier cannot be found.
        ConfigError: An argument has a wrong type.
    """
    config = _checked(backbone, config)
    inputs = example_inputs
    if inputs is not None and not isinstance(inputs, tuple):
        inputs = (inputs,)
    mode = fake_mode_of(backbone)  # without values there is nothing to tell the backbone by
    with mode or nullcontext():
        traced = trace(backbone, inputs)
        decided = make_plan(traced, config, inputs)
        state = backbone_state(backbone.state_dict(), decided.head)
        mark = NO_FINGERPRINT if mode else fingerprint(state)
        layers = architecture(backbone, decided.head)
        former = {} if mode else former_identity(backbone, decided.head)
        rewritten = rewrite(traced, decided, config)
    model = DA3Model(rewritten, decided, config, mark, layers, Original(backbone))
    model.former = former
    if inputs is not None:
        _verify(backbone, model, inputs)
    return model.train(backbone.training)


def _checked(backbone: nn.Module, config: DA3Config | Mapping[str, Any] | None) -> DA3Config:
    if not isinstance(backbone, nn.Module):
        raise ConfigError(f"`backbone` must be a torch.nn.Module, got {type(backbone).__name__}.")
    if any(isinstance(module, DA3Model) for module in backbone.modules()):
        raise ConversionError(
            f"{type(backbone).__name__} is converted already. One conversion serves every domain: "
            "call `add_domain` on the DA3Model instead."
        )
    return DA3Config.of(config)


@torch.no_grad()
def _verify(backbone: nn.Module, model: DA3Model, inputs: tuple[Any, ...]) -> None:
    modes = {module: module.training for module in backbone.modules()}
    try:
        expected = backbone.eval()(*inputs)
        got = model(*inputs)
    except DA3Error:
        raise
    except Exception as error:  # the user's own forward
        raise ConversionError(f"The example inputs do not fit the network: {error}") from error
    finally:
        for module, training in modes.items():
            module.training = training
    try:
        tolerance = 1e-3 if model.config.memory.stored_dtype is None else 0.1  # rounded weights
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    except AssertionError as error:
        raise ConversionError(
            "The converted network does not reproduce the backbone on the example inputs, so its "
            f"forward cannot be described by one graph: {error}"
        ) from error
