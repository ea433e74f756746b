"""Functions of one layer's own weights, read as calls of that layer.

Layers of users often inherit from PyTorch's and call the function by themselves, maybe with weights
that they compute in every call. In eval such a layer is PyTorch's own, with the computed weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from lightning_da3.layers import BATCH_NORMS, CONVS, facts_of_kind, has_hooks, kinds_that_call
from lightning_da3.torch_private.fake import is_fake

DERIVED = "weights_are_derived"  # marks a layer whose weight its network computes from others

_DEFAULTS = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1, "eps": 1e-5}


def call_layers_(graph: fx.Graph, root: nn.Module) -> None:
    """``F.linear(x, layer.weight, layer.bias)`` becomes ``layer(x)``, for PyTorch's layers.

    Args:
        graph: The graph of `root`; edited in place.
        root: A copy that nobody else uses: its layers become PyTorch's own.
    """
    owners: dict[str, list[tuple[fx.Node, type[nn.Module], dict[str, Any]]]] = {}
    for node in graph.nodes:
        kinds = kinds_that_call(node.target) if node.op == "call_function" and node.args else ()
        if not kinds:
            continue
        names = facts_of_kind(kinds[0]).arguments
        call = {**dict(zip(names, node.args[1:], strict=False)), **node.kwargs}
        owner = _owner(call.get("weight"))
        if owner is None or "input" in call:
            continue
        layer = root.get_submodule(owner)
        kind = next((k for k in kinds if isinstance(layer, k)), None)
        if kind is not None:
            owners.setdefault(owner, []).append((node, kind, call))
    for name, calls in owners.items():
        layer = root.get_submodule(name)
        kind = calls[0][1]
        if has_hooks(layer):
            continue
        if not all(_is_call_of(layer, root, call) for _, _, call in calls):
            continue
        weights = [_value(call["weight"], root) for _, _, call in calls]
        if any(not _one_weight(weight, weights[0]) for weight in weights):
            continue
        if next(layer.children(), None) is not None and kind not in BATCH_NORMS:
            continue
        if weights[0] is not layer.weight:
            layer.weight = nn.Parameter(weights[0].detach(), requires_grad=False)
            setattr(layer, DERIVED, True)
        layer.__class__ = kind
        for node, _, _ in calls:
            node.op, node.target = "call_module", name
            node.args, node.kwargs = node.args[:1], {}
    for node in reversed(list(graph.nodes)):  # weights that nobody computes with any more
        constant = node.op == "get_attr" or (node.op.startswith("call") and _owner(node))
        if constant and not node.users:
            graph.erase_node(node)


def _owner(weight: Any) -> str | None:
    """The one module whose tensors alone `weight` is computed from."""
    owners: set[str] = set()
    waiting, seen = [weight], set()
    while waiting:
        node = waiting.pop()
        if not isinstance(node, fx.Node) or node.op in ("placeholder", "call_module"):
            return None
        if node in seen:
            continue
        seen.add(node)
        if node.op == "get_attr":
            owners.add(str(node.target).rpartition(".")[0])
        elif not node.all_input_nodes or len(seen) > 100:
            return None
        waiting += node.all_input_nodes
    return owners.pop() if len(owners) == 1 and "" not in owners else None


def _is_call_of(layer: nn.Module, root: nn.Module, call: dict[str, Any]) -> bool:
    """Whether the function gets of everything but the weight what the layer has."""
    if call.pop("training", False):
        return False
    call.pop("momentum", None)
    if isinstance(layer, CONVS) and layer.padding_mode != "zeros":
        return False
    for name in [*call, *(n for n in _DEFAULTS if hasattr(layer, n))]:
        if name == "weight":
            continue
        given, own = call.get(name, _DEFAULTS.get(name)), getattr(layer, name, None)
        if isinstance(given, fx.Node):
            if given.op != "get_attr" or _value(given, root) is not own:
                return False
        elif not _same(given, own):
            return False
    return True


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, int) and isinstance(other, tuple):
        return all(one == item for item in other)
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return tuple(one) == tuple(other)
    return type(one) is type(other) and bool(one == other)


@torch.no_grad()
def _value(node: fx.Node, root: nn.Module) -> Tensor:
    """What a constant is."""

    def value(node: fx.Node) -> Any:
        args = fx.map_arg(node.args, value)
        kwargs = fx.map_arg(node.kwargs, value)
        if node.op == "get_attr":
            path, _, name = str(node.target).rpartition(".")
            return getattr(root.get_submodule(path), name)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return cast(Callable[..., Any], node.target)(*args, **kwargs)

    result: Tensor = value(node)
    return result


def _one_weight(one: Tensor, other: Tensor) -> bool:
    if is_fake(one) or is_fake(other):  # without values: tensors of one origin
        return one.shape == other.shape
    return torch.equal(one, other)
