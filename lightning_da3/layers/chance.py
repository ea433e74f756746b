"""Which calls may draw random numbers: what is computed twice must not draw twice."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lightning_da3.layers.facts import TABLE, name_of
from lightning_da3.layers.functions import facts_of_function

# parts of the names of functions that draw and are no operators of PyTorch's own
_WORDS = ("rand", "drop", "stochastic", "gumbel", "fractional_max_pool", "lowrank", "multi_head")
_OFF_IF_FALSE = ("training", "train")
_OFF_IF_ZERO = ("p", "dropout_p", "drop_prob", "dropout")
# parameters of functions without a signature, and the values that some have by default
_PARAMETERS: dict[str, tuple[str, ...]] = {
    "scaled_dot_product_attention": ("query", "key", "value", "attn_mask", "dropout_p"),
    "rrelu": ("input", "lower", "upper", "training"),
}
_DROPOUT = ("input", "p", "train")
_BY_DEFAULT: dict[str, dict[str, Any]] = {
    "scaled_dot_product_attention": {"dropout_p": 0.0},
    "rrelu": {"training": False},
}


def may_draw(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call may draw random numbers.

    Args:
        function: A function, or a method's name.
        args: What it is called with; nodes of a graph stand for what is not known.
        kwargs: What it is called with by name.
    """
    if facts_of_function(function).random:
        return True
    name = name_of(function).split(".")[0]
    home = str(getattr(function, "__module__", None) or "")
    if home.startswith(("torch.nn.init", "torch.distributions")):
        return True
    if not (any(word in name for word in _WORDS) or _is_seeded(name)):
        return False
    given = _arguments(function, name, args, kwargs)
    off = any(given.get(key) is False for key in _OFF_IF_FALSE)
    return not (off or any(_is_zero(given.get(key)) for key in _OFF_IF_ZERO))


def without_chance(
    function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The arguments, by name, of a call that is held in eval; None if no argument says so.

    Args:
        function: A function such as `torch.nn.functional.dropout`.
        args: What it is called with.
        kwargs: What it is called with by name.
    """
    given = _arguments(function, name_of(function), args, kwargs)
    off: dict[str, bool | float] = {key: False for key in _OFF_IF_FALSE if key in given}
    off = off or {key: 0.0 for key in _OFF_IF_ZERO if key in given}
    return {**given, **off} if off else None


def layer_may_draw(layer: nn.Module) -> bool:
    """Whether a layer, held in eval, may draw random numbers: unknown ones may."""
    if type(layer) in TABLE:
        return TABLE[type(layer)].random
    if isinstance(layer, torch.fx.GraphModule):
        return any(_node_may_draw(layer, node) for node in layer.graph.nodes)
    return not type(layer).__module__.startswith(("torch.nn.", "lightning_da3."))


def _node_may_draw(gm: torch.fx.GraphModule, node: torch.fx.Node) -> bool:
    if node.op == "call_module":
        return layer_may_draw(gm.get_submodule(str(node.target)))
    calls = node.op in ("call_function", "call_method")
    return calls and may_draw(node.target, node.args, node.kwargs)


@functools.cache
def _is_seeded(name: str) -> bool:
    """Whether PyTorch says so of an operator of this name."""
    packet = getattr(torch.ops.aten, name, None)
    if packet is None or not hasattr(packet, "overloads"):
        return False
    seeded = torch.Tag.nondeterministic_seeded
    return any(seeded in getattr(packet, overload).tags for overload in packet.overloads())


def _is_zero(value: Any) -> bool:
    return isinstance(value, (int, float)) and value == 0


def _arguments(
    function: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a call by name, as far as these are known."""
    try:
        bound = inspect.signature(function).bind(*args, **kwargs)
    except (TypeError, ValueError):  # no signature, or a method's name
        names = _PARAMETERS.get(name, _DROPOUT if "dropout" in name else ())
        return {**_BY_DEFAULT.get(name, {}), **dict(zip(names, args, strict=False)), **kwargs}
    bound.apply_defaults()
    return bound.arguments
