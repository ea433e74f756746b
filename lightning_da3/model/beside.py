"""What trains in a module beside the network in it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_da3.errors import ConfigError
from lightning_da3.model.domain import Bank


def outside_of(
    module: nn.Module, network: str, known: Collection[str] = (), prefix: str = ""
) -> Iterator[tuple[str, Tensor]]:
    """What trains in a module beside the network in it, by name.

    Parameters that require a gradient, and the buffers beside them that state dicts have. Not the
    buffers of a part all of whose parameters are frozen, nor those with infinite values, such as
    masks, nor those of PyTorch's losses: they are constants.

    Args:
        module: Holds the network.
        network: The dotted name of that.
        known: Names of what trains, whether it requires a gradient now or not.
        prefix: What names begin with.

    Raises:
        ConfigError: A parameter has no shape yet.
    """
    persistent = set(nn.Module.state_dict(module, prefix=prefix, keep_vars=True))
    own: dict[str, Any] = {"prefix": prefix[:-1], "recurse": False}
    parts = [(dict(module.named_parameters(**own)), dict(module.named_buffers(**own)))]
    for name, child in module.named_children():
        path = prefix + name
        if network.startswith(f"{path}."):
            yield from outside_of(child, network, known, f"{path}.")
        elif path != network and not any(_is_converted(inner) for inner in child.modules()):
            parts.append(_tensors(child, path))
    for parameters, buffers in parts:
        trained = {n: p for n, p in parameters.items() if p.requires_grad or n in known}
        for name, parameter in trained.items():
            if is_lazy(parameter):
                raise ConfigError(
                    f"{name!r}, which is outside of the network, has no shape yet. Run one batch "
                    "through the LightningModule before `fit`, or name its sizes."
                )
            yield name, parameter
        if trained or not parameters or parameters is parts[0][0]:
            for name, buffer in buffers.items():
                if name in persistent and (name in known or _is_finite(buffer)):
                    yield name, buffer


def _tensors(part: nn.Module, path: str) -> tuple[dict[str, nn.Parameter], dict[str, Tensor]]:
    if type(part).__module__ == "torch.nn.modules.loss":
        return {}, {}
    every: dict[str, Any] = {"prefix": path, "remove_duplicate": False}
    return dict(part.named_parameters(**every)), dict(part.named_buffers(**every))


def _is_converted(module: nn.Module) -> bool:
    return isinstance(dict(module.named_children()).get("bank"), Bank)


def _is_finite(buffer: Tensor) -> bool:
    return not buffer.is_floating_point() or bool(torch.isfinite(buffer).all())
