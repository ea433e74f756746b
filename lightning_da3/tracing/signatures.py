"""The arguments of the forward that is traced, as its decorators and its own code see them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from lightning_da3.errors import ConversionError

_SIMPLE = (type(None), bool, int, float, str)
_STARS: dict[Any, str] = {
    inspect.Parameter.VAR_POSITIONAL: "*",
    inspect.Parameter.VAR_KEYWORD: "**",
}


def options_of(module: nn.Module, given: int = 1) -> dict[str, Any]:
    """What a forward is called without, by name, and what it is then.

    ``"**kwargs"`` are arguments that it has no names for: then there are none.

    Args:
        module: The module.
        given: How many of its arguments it is called with; one at least, whatever the default.
    """
    found: dict[str, Any] = {}
    for i, (name, parameter) in enumerate(inspect.signature(module.forward).parameters.items()):
        if parameter.kind is parameter.VAR_KEYWORD:
            found[f"**{name}"] = {}
        elif i >= given and isinstance(parameter.default, _SIMPLE):
            found[name] = parameter.default
    return found


def takes_one(module: nn.Module) -> bool:
    """Whether a forward is called with one argument, as far as its signature tells."""
    parameters = inspect.signature(module.forward).parameters.values()
    needed = [p for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    return len(needed) == 1 or (not needed and len(parameters) > 0)


def call_of(
    forward: Callable[..., Any], args: list[Any], fixed: Mapping[str, Any]
) -> Callable[..., Any]:
    """A call of a forward as users make it: what is as it is by default is not passed.

    `torch.fx` calls the outermost decorator with everything by position, under wrong names.

    Args:
        forward: Of a class, maybe decorated.
        args: The module, and the value of every parameter, keyword-only ones before ``*args``.
        fixed: Arguments that are always this, named as `options_of` names them.

    Raises:
        ConversionError: A decorator may read arguments that are not known by name.
    """
    _, *parameters = inspect.signature(inspect.unwrap(forward)).parameters.values()
    parameters.sort(key=lambda p: _STARS.get(p.kind, ""))
    given, named = args[:1], {}
    for parameter, value in zip(parameters, args[1:], strict=True):
        name = _STARS.get(parameter.kind, "") + parameter.name
        if name in fixed and parameter.kind is parameter.VAR_KEYWORD:
            named.update(fixed[name])
            continue
        if name in fixed and fixed[name] is parameter.default:
            continue
        if name.startswith("*"):
            raise ConversionError(f"its decorators may read {name}")
        if parameter.kind is parameter.KEYWORD_ONLY or fixed:
            named[parameter.name] = value
        else:
            given.append(value)
    # torch.fx calls it with all of them
    return lambda *_: forward(*given, **named)
