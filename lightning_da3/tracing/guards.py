"""What a graph checks in every call: that what its tracing decided still holds."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import has_side_effect

from lightning_da3.errors import InputError
from lightning_da3.layers import facts_of, register


class GuardError(InputError):
    """An input for which the traced forward would have done something else.

    Args:
        fact: What it was traced with, and what came.
        advice: What to do where it cannot be traced once more.
    """

    def __init__(self, fact: str, advice: str) -> None:
        super().__init__(f"{fact} {advice}")
        self.fact = fact


def must_be_default(value: Any, name: str, default: Any) -> None:
    """Refuse an argument that the traced forward branches on.

    Raises:
        GuardError: It is not what it is by default.
    """
    if value is not default and value != default:
        raise GuardError(
            f"`{name}` was traced as {default!r}, which the network's forward branches on.",
            f"To use it, convert a module whose forward always passes `{name}` on to the network.",
        )


def must_be(value: Any, decided: Any, place: str) -> None:
    """Refuse an input for which the traced forward would have taken another branch.

    Raises:
        GuardError: It is not what it was.
    """
    if value != decided:
        raise GuardError(
            f"The network's forward decides on its input's sizes or type ({place}). It was traced "
            f"where that is {decided!r}, and here it is {value!r}.",
            "Convert the network with `example_inputs` like this input, or put what decides into a "
            "module of its own, which then stays Python.",
        )


def autocast_must_be_off(kind: str) -> None:
    """Refuse autocast where the traced forward switches it off, or asks whether it is on.

    Raises:
        GuardError: It is on for this type of device.
    """
    if torch.is_autocast_enabled(kind):
        raise GuardError(
            f"The network's forward switches autocast off, or asks for it. It was traced where "
            f"that is off for {kind!r}, and here it is on.",
            "Convert the network inside `torch.autocast`: what does that then stays Python.",
        )


def may_check(node: fx.Node, varies: str, module: nn.Module | None, alike: bool) -> bool:
    """Whether a decision is one that is checked in every call, rather than made in Python.

    That is one on sizes, where much would stay Python, and one on what does not change on the way.

    Args:
        node: What is decided on.
        varies: What that depends on, as `lightning_da3.tracing.probes` says.
        module: The one whose forward decides; None: the whole network.
        alike: The probes are of one size: whatever depends on sizes is checked.
    """
    if varies != "size":
        return _asks_inputs(node) or asks_device(node)
    return alike or module is None or _holds_layers(module)


def _asks_inputs(node: fx.Node) -> bool:
    """Whether a value says something of the types of the network's arguments alone.

    Autocast, which changes the types of what is computed on the way, leaves those as they are.
    """
    waiting = [node]
    for each in waiting:
        tensor = each.op in ("placeholder", "get_attr")
        if not (tensor or each.target in (getattr, operator.eq, operator.ne)):
            return False
        waiting += each.all_input_nodes
    return True


_DEVICES = ("device", "is_cuda", "is_cpu", "is_mps")


def asks_device(node: fx.Node) -> bool:
    """Whether a value says something of the device of a tensor, which is the network's."""
    asked = [node]
    for each in asked:
        if each.target is getattr and each.args[1] in _DEVICES:
            continue
        if each.target not in (getattr, operator.eq, operator.ne) or not each.all_input_nodes:
            return False
        asked += each.all_input_nodes
    return True


def _holds_layers(module: nn.Module) -> bool:
    """Whether a module has several layers that mix channels: more than one to embed or project."""
    layers = [m for m in module.modules() if facts_of(m).mixes_channels]
    return len(layers) > 1


GUARDS = (must_be_default, must_be, autocast_must_be_off)
for _guard in GUARDS:
    register(_guard, keeps="nothing", pure=True)
    has_side_effect(_guard)  # dead code elimination leaves them
