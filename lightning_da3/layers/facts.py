"""The table of what is known, and `register`, which fills it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias

import torch
from torch import nn

from lightning_da3.errors import ConfigError

Builder: TypeAlias = Callable[[bool], nn.Module]  # takes: may it overwrite its input?

KEEPS_REPLACED = ("nothing", "bits", "codes", "kept")
KEEPS_AS_IT_IS = ("nothing", "bits", "kept")
DOES = ("", "sum", "product", "quotient", "concatenation", "permutation", "softmax")


@dataclass(frozen=True)
class Replacement:
    """What takes the place of a layer.

    Attributes:
        build: Makes the module; its argument says whether the input may be overwritten. None
            removes the layer (dropout in eval).
        keeps: What its backward keeps: ``"nothing"``, ``"bits"`` (one an input element, or
            at most eight an output element; exact), ``"codes"`` (one byte an input element,
            which rounds the derivative: not used in exact mode) or ``"kept"`` (tensors, as
            PyTorch does).
        inplace: Whether the user's layer overwrites its input. None if the replacement cannot.

    Raises:
        ConfigError: `keeps` is none of these.
    """

    build: Builder | None
    keeps: str = "nothing"
    inplace: bool | None = None

    def __post_init__(self) -> None:
        if self.keeps not in KEEPS_REPLACED:
            raise ConfigError(
                f"`keeps` of a Replacement must be one of {list(KEEPS_REPLACED)}, got "
                f"{self.keeps!r}."
            )


Rule: TypeAlias = Callable[[Any], Replacement | None]


@dataclass(frozen=True)
class Facts:
    """What is known of a layer, function or method. By default nothing: PyTorch's way is kept.

    Attributes:
        rule: Gives the replacement of a layer, or None to leave it as it is.
        layer: Makes the layer that does what a function or method does, from the arguments behind
            the input. It returns None if no layer does.
        keeps: What PyTorch keeps for backward, with frozen weights: ``"nothing"``, ``"bits"`` or
            ``"kept"`` (tensors).
        by_sample: (N, ..) becomes (N, ..), and a sample depends on no other sample.
        elementwise: An element depends on no other position. Channels are not mixed.
        mixes_channels: It is a linear map over channels.
        does: ``"sum"``, ``"product"``, ``"quotient"``, ``"concatenation"``, ``"permutation"``,
            ``"softmax"`` or ``""``. A product or quotient keeps of each operand what the others'
            gradients need.
        view: The result may share the memory of the first argument.
        copying: The method that does what a view does, and copies where there is no such view.
        in_place: The result is written into the first argument. Names such as ``add_`` say so.
        gives_number: The result is not a tensor but a size, a number of axes or the like.
        has_modes: A layer of PyTorch may compute something else in train mode. Others' always may.
        pure: The result depends on nothing but the arguments.
        random: It draws random numbers, in eval too. Layers of others always may, unless they are
            registered.
        sensitive: Its gradient is far off where its argument is rounded a little, as where it
            divides by differences of eigenvalues or selects: it is not computed from codes.
        steep: Its derivative by its last tensor is without bound, as that of a logarithm, or turns
            fast, as that of a sine: computed from codes only where that tensor is a mean, a sum or
            the like, in which the codes' errors cancel.
        rank: The number of axes of input and output, the batch among them. 0: any.
        function: The function that a layer calls on its input and its own tensors.
        arguments: The names of those tensors and of the layer's other attributes, in the order in
            which the function takes them.
    """

    rule: Rule | None = None
    layer: Callable[..., nn.Module | None] | None = None
    keeps: str = "kept"
    by_sample: bool = False
    elementwise: bool = False
    mixes_channels: bool = False
    does: str = ""
    view: bool = False
    copying: str = ""
    in_place: bool = False
    gives_number: bool = False
    has_modes: bool = False
    pure: bool = False
    random: bool = False
    sensitive: bool = False
    steep: bool = False
    rank: int = 0
    function: Callable[..., Any] | None = None
    arguments: tuple[str, ...] = ()


UNKNOWN = Facts()
TABLE: dict[Any, Facts] = {}  # by exact type, by function, by name of a method or of PyTorch's own


def register(*what: Any, **facts: Any) -> Callable[[Rule], Rule]:
    """Say what is known of layers, functions or methods when a network is converted.

    ::

        register(MyNorm, by_sample=True)

        @register(MyReLU, by_sample=True, elementwise=True)
        def my_relu(layer):
            return Replacement(lambda overwrite: MyCheapReLU(overwrite), "bits", layer.inplace)

    A registered layer becomes one node: conversion does not look inside. A decorated rule takes the
    layer (in eval) and returns a `Replacement`, or None to keep the layer as it is. The replacement
    must compute what the layer computes in eval.

    Args:
        what: Subclasses of `torch.nn.Module`, by exact type; functions that are nodes of a traced
            graph (PyTorch's, or wrapped by `torch.fx.wrap`); names of methods of `torch.Tensor`;
            dotted names of functions whose package may be absent.
        facts: Fields of `lightning_da3.layers.Facts`.

    Returns:
        A decorator for the rule of layers.

    Raises:
        ConfigError: Something is registered already or cannot be, or a fact is unknown or wrong.
    """
    problems = [*map(_problem_with, what), *map(_problem_of, facts, facts.values())]
    if found := [problem for problem in problems if problem]:
        raise ConfigError(" ".join(found))
    TABLE.update(dict.fromkeys(what, Facts(**facts)))

    def add(rule: Rule) -> Rule:
        for kind in what:
            if not isinstance(kind, type):
                raise ConfigError(
                    f"{name_of(kind)} is no layer, so it has no rule. Name the layer that does the "
                    "same: register(.., layer=lambda *args: MyLayer(*args))."
                )
            if TABLE[kind].rule is not None:
                raise ConfigError(_known_already(kind))
            TABLE[kind] = replace(TABLE[kind], rule=rule)
        return rule

    return add


def name_of(what: Any) -> str:
    """The name of a layer, function or method in messages."""
    return what if isinstance(what, str) else str(getattr(what, "__name__", what))


def _known_already(what: Any) -> str:
    rule = TABLE[what].rule
    by = "" if rule is None else f" (its rule is {name_of(rule)})"
    return (
        f"{name_of(what)} is registered already{by}. A layer, function or method is registered "
        "once: change that registration, or register a subclass of your own."
    )


def _problem_with(what: Any) -> str | None:
    layer = isinstance(what, type) and issubclass(what, nn.Module)
    function = callable(what) and not isinstance(what, (type, nn.Module))
    name = isinstance(what, str) and (hasattr(torch.Tensor, what) or "." in what)
    if not (layer or function or name):
        return (
            "`register` takes subclasses of torch.nn.Module, functions, names of Tensor methods "
            f"and dotted names of functions, got {what!r}."
        )
    return _known_already(what) if what in TABLE else None


def _problem_of(fact: str, value: Any) -> str | None:
    known = {field.name: field.default for field in fields(Facts) if field.name != "rule"}
    if fact not in known:
        return f"`register` knows no fact {fact!r}. It knows {', '.join(known)}."
    choices = {"keeps": KEEPS_AS_IT_IS, "does": DOES}.get(fact)
    if choices is not None and value not in choices:
        return f"`{fact}` must be one of {list(choices)}, got {value!r}."
    if isinstance(known[fact], bool) and not isinstance(value, bool):
        return f"`{fact}` must be True or False, got {value!r}."
    return None
