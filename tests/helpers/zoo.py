"""Small networks as users write them, each named for what it does, each with a batch of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.utils._pytree import tree_map

from helpers.classifier import randomise_
from helpers.zoo_forward import (
    ChangedInPlace,
    Checkpointed,
    ClampsAndMasks,
    CompiledInPlace,
    CompiledPart,
    ControlFlowOnData,
    ControlFlowOnShapes,
    CountsCalls,
    DataclassOutput,
    Detector,
    FunctionsWithOwnWeights,
    Hooks,
    ItemsAssigned,
    Pair,
    PartsChangedInPlace,
    RefinesStepwise,
    StandardisedWeights,
)
from helpers.zoo_layers import (
    GatedLinearUnits,
    LayerScale,
    Lazy,
    Norms,
    NormsThatAssert,
    OldWeightNorm,
    Parametrised,
    SensorNetwork,
    SqueezeExcite,
    TiedWeights,
    Transposed,
    Volumes,
)
from helpers.zoo_tokens import (
    MLP,
    CrossAttention,
    EncoderLayers,
    EncoderStack,
    MlpMixer,
    Recurrent,
    RecurrentAlone,
    VisionTransformer,
    Windows,
)

Batch = tuple[object, ...]


def images(count: int = 1, *, channels: int = 3, side: int = 12) -> Callable[[], Batch]:
    return lambda: tuple(torch.randn(2, channels, side, side) for _ in range(count))


def of_shapes(*shapes: tuple[int, ...]) -> Callable[[], Batch]:
    return lambda: tuple(torch.randn(shape) for shape in shapes)


def _detection() -> Batch:
    pictures = [torch.randn(3, 12, 10), torch.randn(3, 9, 12)]
    targets = [{"box": torch.rand(4), "label": torch.tensor(i)} for i in (1, 3)]
    return pictures, targets


def _pair() -> Batch:
    return torch.randn(2, 3, 12, 12), torch.randn(2, 1, 12, 12)


def _cross() -> Batch:
    padding = torch.tensor([[False] * 4, [False, False, True, True]])
    return torch.randn(2, 3, 7), torch.randn(2, 4, 6), padding


ZOO: dict[str, tuple[Callable[[], nn.Module], Callable[[], Batch]]] = {
    kind.__name__: (kind, batch)
    for kind, batch in (
        (FunctionsWithOwnWeights, images()),
        (StandardisedWeights, images()),
        (ChangedInPlace, images()),
        (PartsChangedInPlace, images()),
        (ItemsAssigned, images()),
        (ClampsAndMasks, images()),
        (Pair, _pair),
        (DataclassOutput, images()),
        (Detector, _detection),
        (ControlFlowOnShapes, images()),
        (ControlFlowOnData, images()),
        (RefinesStepwise, images()),
        (CountsCalls, images()),
        (Checkpointed, images()),
        (CompiledPart, images()),
        (CompiledInPlace, images()),
        (Hooks, images()),
        (TiedWeights, lambda: (torch.randint(11, (2, 9)),)),
        (Parametrised, images()),
        (OldWeightNorm, images()),
        (Transposed, images()),
        (Norms, images()),
        (NormsThatAssert, images()),
        (SqueezeExcite, images()),
        (GatedLinearUnits, images()),
        (LayerScale, images()),
        (SensorNetwork, of_shapes((2, 6, 40))),
        (Volumes, of_shapes((2, 1, 12, 8, 8))),
        (VisionTransformer, images()),
        (Windows, images()),
        (EncoderLayers, of_shapes((2, 7, 5))),
        (EncoderStack, of_shapes((2, 7, 5))),
        (CrossAttention, _cross),
        (Recurrent, of_shapes((2, 3, 9))),
        (RecurrentAlone, of_shapes((9, 2, 3))),
        (MLP, of_shapes((4, 6))),
        (MlpMixer, images()),
        (Lazy, images()),
    )
}


def network(name: str) -> nn.Module:
    """A network of the zoo, the same at every call, in train mode; lazy layers have run."""
    make, _ = ZOO[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = make()
        if any(isinstance(m, nn.modules.lazy.LazyModuleMixin) for m in net.modules()):
            with torch.no_grad():
                net(*batch(name))
        return randomise_(net)


def batch(name: str, dtype: torch.dtype = torch.float32) -> Batch:
    """A batch for a network of the zoo, the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        made = ZOO[name][1]()
    to = lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf  # noqa: E731
    return tree_map(to, made)
