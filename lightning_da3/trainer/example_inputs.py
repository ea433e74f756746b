"""What a LightningModule gives to its network, told by its `example_input_array`."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lightning_da3.verifying.randomness import same_randomness


class _Captured(BaseException):
    """The network was called: with that nothing else is computed."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        super().__init__()
        self.args_given = args


def inputs_of(module: nn.Module, network: nn.Module) -> tuple[Any, ...] | None:
    """The arguments with which a LightningModule calls its network; None if nothing tells.

    Its forward is run on its `example_input_array`, in eval, up to the network.

    Args:
        module: The LightningModule; left unchanged.
        network: Of the module.
    """
    example = getattr(module, "example_input_array", None)
    if example is None:
        return None

    def capture(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Captured(args if not kwargs else ())

    handle = network.register_forward_pre_hook(capture, with_kwargs=True)
    modes = {m: m.training for m in module.modules()}
    try:
        # the user's own forward: if it fails, the network's inputs are guessed
        with torch.no_grad(), same_randomness(), contextlib.suppress(Exception):
            _call(module.eval(), example)
    except _Captured as captured:
        return captured.args_given or None
    finally:
        handle.remove()
        for m, training in modes.items():
            m.training = training
    return None


def _call(module: nn.Module, example: Any) -> None:
    if isinstance(example, Mapping):
        module(**example)
    elif isinstance(example, tuple):
        module(*example)
    else:
        module(example)
