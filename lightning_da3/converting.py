"""``convert``: trace, plan, rewrite."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_da3.config import DA3Config
from lightning_da3.errors import ConfigError, ConversionError
from lightning_da3.files.domain_file import fingerprint
from lightning_da3.memory import fake_mode_of
from lightning_da3.memory.fake import tensors_of
from lightning_da3.model.choosing import check_target
from lightning_da3.model.identity import architecture, backbone_state, former_identity
from lightning_da3.model.model import DA3Model
from lightning_da3.model.original import Original
from lightning_da3.passes.rewriting import rewrite
from lightning_da3.planning.planner import make_plan
from lightning_da3.torch_private.fake import is_fake
from lightning_da3.torch_private.modules import original_of
from lightning_da3.torch_private.trees import tree_map_only
from lightning_da3.tracing.islands import trace
from lightning_da3.verifying.batches import Known, guessed, words_of
from lightning_da3.verifying.comparing import Comparison
from lightning_da3.verifying.randomness import same_randomness
from lightning_da3.verifying.verification import comparisons, verified

NO_FINGERPRINT = "0" * 64


def convert(
    backbone: nn.Module,
    config: DA3Config | Mapping[str, Any] | None = None,
    example_inputs: Any = None,
    verify: bool | None = None,
) -> DA3Model:
    """Turn a pretrained network into one that learns domains in little memory.

    The copy is frozen and held in eval, batch norm is folded, every layer is replaced by one that
    keeps as little as the exact gradient allows, and every host gets a place for adapters.

    Then both networks are run, on copies (hooks that are yours run with them), and compared:
    outputs in eval and in train mode, with gradients and without, twice in a row and on another
    batch, and the gradients of the inputs. A module whose converted form computes something else
    stays Python, and is named by a `ConversionWarning`.

    Args:
        backbone: Any network that `torch.fx` can trace, compiled or not; left unchanged. Compile
            what is returned.
        config: Choices, or a dict of them as YAML gives it; the defaults are good.
        example_inputs: A tensor or a tuple of the network's arguments. If given, their shapes
            decide what is computed again, instead of guessed ones, and the comparison runs on the
            first samples.
        verify: Whether to compare. True: in float64, however long it takes, or in the network's own
            types where there is no memory for copies in float64. None: if the inputs are given or
            can be guessed; of a large network, and with little memory, only one pass on one sample,
            of one that takes very long nothing, and without memory nothing but a warning. The
            conversion takes about three times as long as without.

    Returns:
        A `DA3Model` without domains, which computes what `backbone` computes in eval.

    Raises:
        ConversionError: The network cannot be traced, has nothing to adapt, is converted already,
            its classifier cannot be found, it does not take the example inputs, or its conversion
            computes something else whatever stays Python.
        ConfigError: An argument has a wrong type; or `verify` is True, and the inputs are neither
            given nor can be guessed, or there is no memory to compare; or domains are to skip
            branches, and the network has none, or not enough.

    Warns:
        ConversionWarning: A module stays Python, as its converted form computed something else; or
            there is no memory to compare.
    """
    config = _checked(backbone, config)
    builder = _Builder(backbone, config, _arguments(example_inputs))
    with same_randomness():  # forwards that run may draw
        model = builder({})
        if verify is not False and _has_values(backbone):
            model = verified(builder.backbone, model, builder, builder.known, thorough=verify)
    if config.gate is not None and config.gate.by == "domain":
        check_target(model.plan, config.gate.target)
    return model.train(backbone.training)


def compared(
    backbone: nn.Module, config: DA3Config | None = None, example_inputs: Any = None
) -> tuple[DA3Model, list[Comparison]]:
    """A conversion, and how far it is from the original in everything that `convert` compares.

    Args:
        backbone: See `convert`.
        config: See `convert`.
        example_inputs: See `convert`.

    Raises:
        ConversionError: See `convert`; but what differs is in the list.
        ConfigError: See `convert`.
    """
    builder = _Builder(backbone, _checked(backbone, config), _arguments(example_inputs))
    with same_randomness():
        model = builder({})
        return model, comparisons(builder.backbone, model, builder.known)


def _arguments(example_inputs: Any) -> tuple[Any, ...] | None:
    single = example_inputs is not None and not isinstance(example_inputs, tuple)
    return (example_inputs,) if single else example_inputs


class _Builder:
    """Converts one network, if need be several times.

    Args:
        backbone: The user's network; what `torch.compile` made of one is that one.
        config: The user's choices.
        inputs: The network's arguments, if they are known.
    """

    def __init__(
        self, backbone: nn.Module, config: DA3Config, inputs: tuple[Any, ...] | None
    ) -> None:
        self.given, self.backbone = backbone, original_of(backbone) or backbone
        self.config, self.inputs = config, inputs
        self.mode = fake_mode_of(backbone)  # without values there is nothing to tell it by
        self.original: Original | None = None
        self.known = Known(inputs)
        self.marks: dict[str | None, str] = {}  # by the head

    def __call__(self, python: Mapping[str, str]) -> DA3Model:
        """A conversion in which these modules stay Python; their paths, and why."""
        with self.mode or nullcontext():
            traced = trace(self.backbone, self.inputs, python)
            decided = make_plan(traced, self.config, self.inputs)
            if self.inputs is None and not python:
                self.known = Known(None, guessed(traced), words_of(self.backbone))
            layers = architecture(self.backbone, decided.head)
            rewritten = rewrite(traced, decided, self.config)
        mark = self._fingerprint(decided.head)
        self.original = self.original or Original(self.backbone)
        self.original.keep(self.backbone, rewritten)
        self.original.inputs = tree_map_only(Tensor, _shape_of, self.inputs)
        model = DA3Model(rewritten, decided, self.config, mark, layers, self.original)
        model.former = {} if self.mode else former_identity(self.given, decided.head)
        return model

    def _fingerprint(self, head: str | None) -> str:
        if head not in self.marks:
            state = backbone_state(self.backbone.state_dict(), head)
            self.marks[head] = NO_FINGERPRINT if self.mode else fingerprint(state)
        return self.marks[head]


def _shape_of(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _has_values(network: nn.Module) -> bool:
    return not any(is_fake(t) or t.device.type == "meta" for t in tensors_of(network))


def _checked(backbone: nn.Module, config: DA3Config | Mapping[str, Any] | None) -> DA3Config:
    if not isinstance(backbone, nn.Module):
        raise ConfigError(f"`backbone` must be a torch.nn.Module, got {type(backbone).__name__}.")
    if any(isinstance(module, DA3Model) for module in backbone.modules()):
        raise ConversionError(
            f"{type(backbone).__name__} is converted already. One conversion serves every domain: "
            "call `add_domain` on the DA3Model instead."
        )
    return DA3Config.of(config)
