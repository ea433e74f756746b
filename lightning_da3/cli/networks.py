"""Networks by their names: of torchvision, of timm, or of the user's own factories."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_da3.errors import ConfigError, DA3Error
from lightning_da3.memory import without_values
from lightning_da3.torch_private.fake import (
    READ_ONE_VALUE,
    FakeTensor,
    FakeTensorMode,
    TorchDispatchMode,
    new_fake_mode,
)
from lightning_da3.torch_private.trees import tree_leaves

LARGE = 2**16  # elements


def network_without_values(factory: Callable[[], Any], name: str) -> nn.Module:
    """What `factory` makes, with parameters that have shapes and types but take no memory.

    Args:
        factory: Makes a network.
        name: The network's name, for errors.

    Raises:
        ConfigError: `factory` fails, or makes something else.
    """
    mode = new_fake_mode(allow_non_fake_inputs=True)
    with _Constructing(mode):
        network = made(factory, name)
    return without_values(network, mode)


def made(factory: Callable[[], Any], name: str) -> nn.Module:
    """The network of a factory.

    Args:
        factory: Makes a network.
        name: The network's name, for errors.

    Raises:
        ConfigError: `factory` fails, or makes something else.
    """
    try:
        network = factory()
    except DA3Error:
        raise
    except (Exception, SystemExit) as error:  # of the user's: anything can come
        raise ConfigError(f"{name!r} cannot be made: {type(error).__name__}: {error}") from error
    if not isinstance(network, nn.Module):
        raise ConfigError(f"{name!r} makes a {type(network).__name__}, not a torch.nn.Module.")
    return network


class _Constructing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Large tensors are made without values, and questions about such values answered with zero.

    Small ones are real, as constructors compute with them. Initialisers ask, say, whether any
    number that they drew lies too far out.

    Args:
        mode: The mode of the tensors without values.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.mode = mode

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if func is READ_ONE_VALUE and isinstance(args[0], FakeTensor):
            return torch.zeros((), dtype=args[0].dtype).item()
        if not given and _elements(args) >= LARGE:
            with self.mode:
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def _elements(args: tuple[Any, ...]) -> int:
    """How many elements `torch.empty`, `zeros`, `randn` and their like make of these arguments."""
    size = args[0] if args else ()
    is_size = isinstance(size, (list, tuple)) and all(isinstance(n, int) for n in size)
    return math.prod(size) if is_size else 0


def factory_of(name: str) -> Callable[[], Any]:
    """How to make the network of a name.

    Raises:
        ConfigError: There is none; names that are near are told.
    """
    if ":" in name:
        return _imported(name)
    known: dict[str, Callable[[], Any]] = {}
    packages = [("timm", _timm), ("torchvision", _torchvision)]  # the latter's names go first
    installed = [list_ for package, list_ in packages if importlib.util.find_spec(package)]
    for list_ in installed:
        known.update(list_())
    if name in known:
        return known[name]
    base = name.split(".")[0]  # behind a point stands a tag of weights, as in resnet50.a1_in1k
    if base in known:
        return known[base]
    near = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    hint = f" Near it: {', '.join(near)}." if near else ""
    lacking = "" if installed else " Neither torchvision nor timm is installed."
    raise ConfigError(
        f"There is no network {name!r} in torchvision or timm.{lacking}{hint} For another network "
        "give `module:factory`."
    )


def _torchvision() -> Iterator[tuple[str, Callable[[], Any]]]:
    import torchvision

    for name in torchvision.models.list_models():
        builder = torchvision.models.get_model_builder(name)
        options: dict[str, Any] = {"weights": None}
        takes = inspect.signature(builder).parameters
        if "weights_backbone" in takes:
            options["weights_backbone"] = None
        if name in ("googlenet", "inception_v3"):
            options["init_weights"] = False
        yield name, partial(builder, **options)


def _timm() -> Iterator[tuple[str, Callable[[], Any]]]:
    import timm

    for name in timm.list_models():
        yield name, partial(timm.create_model, name, pretrained=False)


def _imported(name: str) -> Callable[[], Any]:
    found = found_at(name)
    if isinstance(found, nn.Module):
        return lambda: found
    if not callable(found):
        raise ConfigError(f"{name!r} is a {type(found).__name__}: it cannot make a network.")
    return found  # type: ignore[no-any-return]


def found_at(name: str) -> Any:
    """What stands in a module under a name, ``module:name``.

    Raises:
        ConfigError: There is none; names that are near are told.
    """
    module_name, _, path = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # as `python -m` does for its own
    try:
        found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # of the user's module: anything can come
        raise ConfigError(
            f"The module of {name!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    for attribute in path.split("."):
        if not hasattr(found, attribute):
            names = [n for n in dir(found) if not n.startswith("_")]
            near = difflib.get_close_matches(attribute, names, n=4, cutoff=0.5)
            hint = f" Near it: {', '.join(near)}." if near else ""
            raise ConfigError(f"{module_name!r} has no {path!r}.{hint}")
        found = getattr(found, attribute)
    return found
