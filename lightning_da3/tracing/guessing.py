"""What a network may take, where nobody says: inputs of sizes that networks usually have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_da3.layers import CONVS
from lightning_da3.tracing.graphs import module_of

# tried in this order; networks with fixed positions take only their own
SIDES: dict[int, tuple[tuple[int, ...], ...]] = {
    1: ((1024,), (256,), (128,), (64,)),
    2: ((224, 224), (256, 256), (384, 384), (32, 32), (28, 28), (64, 64), (96, 96), (512, 512)),
    3: ((16, 112, 112), (16, 224, 224), (32, 224, 224), (16, 16, 16), (32, 32, 32)),
}
_TOKENS = 64


def first_sample(examples: Sequence[Any], times: int = 1) -> list[Any]:
    """Arguments of one sample, or that several times: all as long as the first one are cut."""
    count = next((len(x) for x in examples if isinstance(x, Tensor) and x.dim()), 0)
    return [
        x[:1].repeat(times, *[1] * (x.dim() - 1))
        if times > 1
        else x[:1]
        if isinstance(x, Tensor) and x.dim() and len(x) == count
        else x
        for x in examples
    ]


def guesses(gm: fx.GraphModule, samples: int = 1) -> Iterator[list[Tensor]]:
    """Inputs that a graph may take, most likely first: a few samples, without memory."""
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    required = [node for node in placeholders if not node.args]
    for inputs in _inputs_of([_reader(gm, node) for node in required], gm):
        yield first_sample(inputs, samples)


def first_guesses(network: nn.Module) -> Iterator[list[Tensor]]:
    """Inputs that a network of one input may take, as one of its layers takes them.

    That is the layer that is registered first, or one with few channels, as images have.
    """
    kinds = (*CONVS, nn.Linear, nn.Embedding, nn.RNNBase)
    layers = [layer for layer in network.modules() if isinstance(layer, kinds)]
    convolutions = [layer for layer in layers if isinstance(layer, CONVS)]
    few = min(convolutions, key=lambda layer: layer.in_channels, default=None)
    for layer in dict.fromkeys([*layers[:1], few]):
        yield from _inputs_of([layer], network)


def _inputs_of(readers: Sequence[nn.Module | None], network: nn.Module) -> Iterator[list[Tensor]]:
    """Inputs whose first readers these layers are."""
    side = getattr(network, "image_size", None)
    for i in range(max(len(sides) for sides in SIDES.values())):
        found = [_guess(layer, i) for layer in readers]
        guess = [g for g in found if g is not None]
        if len(guess) == len(found):
            yield guess
            if i == 0 and isinstance(side, int):
                yield [g.new_empty(*g.shape[:2], *[side] * (g.dim() - 2)) for g in guess]


def _reader(gm: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The first layer with weights that reads `node`, maybe through other operations."""
    seen = [node]
    for reader in seen:
        for user in reader.users:
            layer = module_of(gm, user)
            if isinstance(layer, (*CONVS, nn.Linear, nn.Embedding, nn.RNNBase)):
                return layer
            if user not in seen and len(seen) < 30:
                seen.append(user)
    return None


def _guess(layer: nn.Module | None, i: int) -> Tensor | None:
    if isinstance(layer, CONVS):
        sides = SIDES[layer.weight.dim() - 2]
        shape = (1, layer.in_channels, *sides[i]) if i < len(sides) else None
    elif isinstance(layer, nn.Linear):
        shape = ((1, _TOKENS, layer.in_features), (1, layer.in_features), None)[min(i, 2)]
    elif isinstance(layer, nn.RNNBase):
        row = (1, _TOKENS) if layer.batch_first else (_TOKENS, 1)
        shape = (*row, layer.input_size) if i == 0 else None
    elif isinstance(layer, nn.Embedding):
        return None if i else torch.empty((1, _TOKENS), dtype=torch.long, device="meta")
    else:
        return None
    dtype = next(layer.parameters()).dtype
    return None if shape is None else torch.empty(shape, dtype=dtype, device="meta")
