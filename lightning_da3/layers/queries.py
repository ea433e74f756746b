"""Questions to the table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx, nn

from lightning_da3.errors import ConfigError
from lightning_da3.layers.facts import TABLE, UNKNOWN, Facts, Replacement, name_of
from lightning_da3.layers.functions import NUMBERS, facts_of_function
from lightning_da3.layers.modules import BATCH_NORMS, CONVS
from lightning_da3.torch_private.modules import (
    BACKWARD_HOOKS,
    DROPOUT_LAYERS,
    FORWARD_HOOKS,
    hooks_of,
)

# --- layers ---------------------------------------------------------------------------------------


def facts_of(layer: nn.Module | None) -> Facts:
    """What is known of a layer's exact type."""
    return facts_of_kind(type(layer))


def facts_of_kind(kind: type) -> Facts:
    """What is known of an exact type."""
    return TABLE.get(kind, UNKNOWN)


def is_registered(kind: type[nn.Module]) -> bool:
    """Whether anything is known of this exact type."""
    return kind in TABLE


def replacement_for(layer: nn.Module, exact: bool = False) -> Replacement | None:
    """What takes the place of `layer`, or None if it stays as it is.

    Args:
        layer: A layer in eval.
        exact: Whether only what gives the exact gradient will do.

    Raises:
        ConfigError: A user's rule returned something else.
    """
    rule = facts_of(layer).rule
    if rule is None or has_hooks(layer):
        return None
    found = rule(layer)
    if not (found is None or isinstance(found, Replacement)):
        raise ConfigError(
            f"The rule {name_of(rule)} of {type(layer).__name__} must return a Replacement, or None"
            f" to keep the layer, got {found!r}."
        )
    return None if found is None or (exact and found.keeps == "codes") else found


def has_hooks(layer: nn.Module) -> bool:
    """Whether the user's hooks hang on `layer`, which nothing else would run."""
    return any(hooks_of(layer, (*FORWARD_HOOKS, *BACKWARD_HOOKS)))


def has_frozen_form(layer: nn.Module) -> bool:
    """Whether conversion changes this layer at all."""
    return type(layer) in (*CONVS, *BATCH_NORMS) or replacement_for(layer) is not None


def has_modes(layer: nn.Module) -> bool:
    """Whether a layer of the rewritten network may compute something else in train mode."""
    if not type(layer).__module__.startswith(("torch.nn.", "lightning_da3.")):
        return not isinstance(layer, fx.GraphModule)
    return any(facts_of_kind(kind).has_modes for kind in type(layer).__mro__)  # ours inherit


def kinds_that_call(function: Any) -> tuple[type[nn.Module], ...]:
    """The layers that call `function` on their input and their own tensors."""
    return tuple(k for k, facts in TABLE.items() if facts.function is function)


# --- functions and methods ------------------------------------------------------------------------


def operation(node: fx.Node) -> str:
    """The name of what `node` calls."""
    return str(getattr(node.target, "__name__", node.target))


def facts_of_call(node: fx.Node) -> Facts:
    """What is known of the function or method that `node` calls; nothing for other nodes."""
    calls = node.op in ("call_function", "call_method")
    return facts_of_function(node.target) if calls else UNKNOWN


def writes(function: Callable[..., Any] | str) -> bool:
    """Whether a function or method writes into its first argument: ``x.add_(y)``, ``x += y``."""
    name = name_of(function).removeprefix("__").removesuffix("__")
    return name.endswith("_") or name == "setitem" or TABLE.get(name, UNKNOWN).in_place


WRITES = "writes"  # key of a node's meta: it writes its result into its first argument


def is_in_place(node: fx.Node) -> bool:
    """Whether `node` calls such a function or method, or was seen to write as they do."""
    if node.meta.get(WRITES):
        return True
    return node.op in ("call_function", "call_method") and (
        facts_of_call(node).in_place or writes(node.target)
    )


# views that the table does not have, and what is its input itself where there is nothing to do
_MAY_SHARE = (
    "cpu cuda broadcast_to ravel atleast_1d atleast_2d atleast_3d unfold view_as_real "
    "view_as_complex reshape_as resolve_conj getattr requires_grad_ swapaxes_ squeeze_ unsqueeze_ "
    "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout"
).split()


def may_share(node: fx.Node, layer: nn.Module | None = None) -> bool:
    """Whether a node's value may lie in the memory of its first argument.

    Args:
        node: Any node.
        layer: What it calls, if that is a module.
    """
    if layer is not None:
        return isinstance(layer, (nn.Identity, nn.Flatten, nn.Unflatten, DROPOUT_LAYERS))
    return facts_of_call(node).view or operation(node) in _MAY_SHARE


def attribute_is_number(name: Any) -> bool:
    """Whether this attribute of a tensor is not a tensor, such as its shape."""
    return name in NUMBERS


def copying_name(function: Any) -> str:
    """The method that does what this view does, and copies if need be. "" if there is none."""
    return facts_of_function(function).copying


# functions of these depend on nothing but their arguments, unless their name says otherwise
_PURE = ("torch", "_operator", "operator", "math", "torchvision", "timm", "einops", "builtins")


def is_pure(function: Any) -> bool:
    """Whether what a function computes depends on nothing but its arguments and chance."""
    home = str(getattr(function, "__module__", "") or "")
    return facts_of_function(function).pure or home.split(".")[0] in _PURE
