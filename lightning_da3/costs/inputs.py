"""What a network is given where nobody says: images or tokens of a size that it may take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from lightning_da3.errors import ConfigError
from lightning_da3.formatting import shown
from lightning_da3.model.model import DA3Model
from lightning_da3.tracing.guessing import SIDES, guesses


def inputs_for(
    model: DA3Model, batch_size: int, image_size: int | Sequence[int] | None
) -> Iterator[tuple[Any, ...]]:
    """Arguments without values to try, most likely first.

    Args:
        model: The converted network.
        batch_size: The number of samples.
        image_size: The size of every spatial axis, or of each; None: guessed.

    Raises:
        ConfigError: A size is not positive, or the network has no images to have a size.
    """
    plan = model.plan
    given: Any = image_size
    listed = isinstance(given, Sequence) and not isinstance(given, str)
    sides = list(given) if listed else [] if given is None else [given]
    if not all(map(_is_size, [batch_size, *sides])) or (image_size is not None and not sides):
        raise ConfigError(
            "`batch_size` and `image_size` must be ints of at least 1, got "
            f"{shown(batch_size)} and {shown(image_size)}."
        )
    if plan.input_channels is not None:
        axes, channels = plan.input_channels
        if sides and len(sides) not in (1, axes):
            raise ConfigError(
                f"`image_size` must be one number or {axes}, as {plan.network} has so many spatial "
                f"axes, got {image_size}."
            )
        own = getattr(model.backbone, "image_size", None)
        guess = [(own,) * axes] if isinstance(own, int) else []
        for size in [tuple(sides) * (axes // len(sides))] if sides else [*guess, *SIDES[axes]]:
            shape = (batch_size, channels, *size)
            yield (torch.empty(shape, dtype=model.dtype, device="meta"),)
    elif image_size is not None:
        raise ConfigError(
            f"`image_size` makes no sense for {plan.network}, whose first layer is no convolution "
            "of its input. Leave it out, or give `inputs`."
        )
    elif isinstance(model.backbone, fx.GraphModule):
        for sample in guesses(model.backbone):
            yield tuple(x.new_empty(batch_size, *x.shape[1:]) for x in sample)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**20
