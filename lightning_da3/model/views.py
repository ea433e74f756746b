"""The user's network as its own classes show it, with what it computes with by now; to read."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Iterator
from types import FunctionType
from typing import Any, Protocol, cast

from torch import Tensor, nn

from lightning_da3.errors import DA3Error
from lightning_da3.model.entries import has_tensors
from lightning_da3.model.original import Original
from lightning_da3.nn.head import HeadSlot
from lightning_da3.torch_private.fake import is_fake

_SHOWN = frozenset({"_modules", "_parameters", "_buffers", "training"})
_EDITS = frozenset({"_apply", "add_module", "compile", "load_state_dict", "set_submodule"})
_SOURCE, _PATH, _MODEL = "_da3_source", "_da3_path", "_da3_model"


class Viewed(Protocol):
    """What is used here of a DA3Model."""

    backbone: nn.Module
    original: Original
    training: bool

    def run_method(self, path: str, method: str, args: Any, kwargs: Any) -> Any:
        """What a method of a part of the user's network returns."""

    def own_parameters(self, path: str) -> Iterator[tuple[str, nn.Parameter]]:
        """What the active domain has in a part of the user's network."""


class View(nn.Module):
    """A part of a converted network, under its own name; made by `view_of`.

    Attributes, submodules and methods are those of the user's class. Parameters are those that the
    converted network computes with, and the active domain's. Calls with tensors compute as
    `DA3Model.forward` does: on rewritten layers, with the active domain's adapters. It is to be
    read: nothing of it can be set.
    """

    def __getattribute__(self, name: str) -> Any:
        """What stands for the user's."""
        if name.startswith(("__", "_da3_")):
            return super().__getattribute__(name)
        if name in _SHOWN:
            return _shown(self, name)
        if name in _EDITS or name.startswith("register_"):
            _refuse(self, name)
        value = super().__getattribute__(name)
        if isinstance(value, Tensor) and is_fake(value):
            return _held(self, name)
        function = getattr(value, "__func__", None)
        if not (isinstance(function, FunctionType) and value.__self__ is self):
            return value
        if not _is_pytorchs(function):
            return functools.wraps(function)(functools.partial(_call, self, name, value))
        return value

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let no class of the user's hear of it."""

    def __getattr__(self, name: str) -> Any:
        """A submodule, a parameter or a buffer; else whatever the user's class says."""
        if not name.startswith(("__", "_da3_")):
            if name in vars(self)[_SOURCE]._modules:
                return _child(self, name)
            for held in (self._parameters, self._buffers):
                if name in held:
                    return held[name]
        return super().__getattr__(name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What this part of the network returns."""
        return vars(self)[_MODEL].run_method(vars(self)[_PATH], "forward", args, kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse; modes alone are taken, as the backbone is held in eval whatever they say."""
        if name != "training":
            _refuse(self, name)

    def __delattr__(self, name: str) -> None:
        """Refuse."""
        _refuse(self, name)

    def __reduce__(self) -> Any:
        """Refuse."""
        raise DA3Error(
            f"{_name(self)} is a view of a converted network and cannot be copied or pickled by "
            "itself. Copy the DA3Model, and ask it for this part."
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Refuse."""
        return self.__reduce__()

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Those of the network, frozen, and of the active domain's adapters in this part."""
        yield from super().named_parameters(prefix, recurse, remove_duplicate)
        if recurse:
            dot = f"{prefix}." if prefix else ""
            for name, parameter in vars(self)[_MODEL].own_parameters(vars(self)[_PATH]):
                yield dot + name, parameter


def _is_pytorchs(function: FunctionType) -> bool:
    return str(function.__module__).startswith(("torch.nn.modules.", "lightning_da3."))


def _call(view: View, name: str, method: Any, *args: Any, **kwargs: Any) -> Any:
    """What computes is rewritten; what only asks runs as it is."""
    if name != "forward" and not has_tensors(args, kwargs):
        return method(*args, **kwargs)
    return vars(view)[_MODEL].run_method(vars(view)[_PATH], name, args, kwargs)


def _name(view: View) -> str:
    return f"`{vars(view)[_PATH] or type(view).__name__}`"


def _refuse(view: View, name: str) -> None:
    raise DA3Error(
        f"{_name(view)} is part of a converted network, which is frozen and shared by every "
        f"domain: {name!r} cannot be set or called. For another classifier, `add_domain(name, "
        "num_classes)`; to change the network, or to hook into it, do so before the conversion."
    )


def _shown(view: View, name: str) -> Any:
    state = vars(view)
    source, path, model = state[_SOURCE], state[_PATH], state[_MODEL]
    if name == "training":
        return model.training
    if name == "_modules":
        return {key: _child(view, key) for key in source._modules}
    held: dict[str, Any] = {}
    for key, value in getattr(source, name).items():
        held[key] = None if value is None else _tensor(model, path, key)
    return {key: value for key, value in held.items() if value is not _GONE}


_GONE = object()


def _tensor(model: Viewed, path: str, key: str) -> Any:
    """A parameter or buffer that the network computes with."""
    name = f"{path}.{key}" if path else key
    for inner in ("", "original.", "layer.", "function."):
        where = f"{path}.{inner}".strip(".")
        try:
            module = model.backbone.get_submodule(where)
        except AttributeError:
            continue
        value = getattr(module, key, None)
        if isinstance(value, Tensor):
            return value
    spare = model.original.spare.get(name)
    return _GONE if spare is None else spare


def _held(view: View, name: str) -> Tensor:
    """A tensor that is neither parameter nor buffer."""
    path, model = vars(view)[_PATH], vars(view)[_MODEL]
    value = _tensor(model, path, name)
    if value is _GONE:
        raise AttributeError(
            f"{_name(view)} holds the tensor {name!r} outside of its parameters and buffers, and "
            "its value is gone with the conversion. Register it as a buffer."
        )
    return value  # type: ignore[no-any-return]


def _child(view: View, key: str) -> nn.Module | None:
    state = vars(view)
    child = state[_SOURCE]._modules[key]
    if child is None:
        return None
    path = f"{state[_PATH]}.{key}".lstrip(".")
    slot = _slot(state[_MODEL].backbone, path)
    if slot is not None and slot.active is not None:
        return slot.active
    views = state["_da3_views"]
    if key not in views:
        views[key] = view_of(state[_MODEL], path)
    return views[key]  # type: ignore[no-any-return]


def _slot(backbone: nn.Module, path: str) -> HeadSlot | None:
    try:
        found = backbone.get_submodule(path)
    except AttributeError:
        return None
    return found if isinstance(found, HeadSlot) else None


@functools.cache
def _kind(kind: Any) -> Any:
    about: dict[str, Any] = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    if issubclass(kind, (nn.Sequential, nn.ModuleList)):
        about["__getitem__"] = functools.partialmethod(_item, kind)
    return type(kind)(kind.__name__, (View, kind), about)


def _item(view: Any, kind: Any, index: Any) -> Any:
    """One of a sequence, or several as a plain sequence of views."""
    if not isinstance(index, slice):
        return kind.__getitem__(view, index)
    items = list(view._modules.items())[index]
    if issubclass(kind, nn.Sequential):
        return nn.Sequential(OrderedDict(items))
    return nn.ModuleList([child for _, child in items])


def view_of(model: Viewed, path: str = "") -> nn.Module:
    """A view of a part of the user's network; "" is all of it.

    Raises:
        DA3Error: The model does not know its network any more.
    """
    network = model.original.network
    if network is None:
        raise DA3Error(
            "A model that was saved forgets the network that it was made from. Convert the network "
            "here, and load the domains."
        )
    source = network.get_submodule(path)
    view: Any = object.__new__(_kind(cast(Any, type(source))))
    vars(view).update({k: v for k, v in vars(source).items() if k not in _SHOWN})
    vars(view).update({_SOURCE: source, _PATH: path, _MODEL: model, "_da3_views": {}})
    return view  # type: ignore[no-any-return]


def has_name(network: nn.Module, name: str) -> bool:
    """Whether a network has an attribute, as far as that can be told without running its code."""
    held = (vars(network), network._modules, network._parameters, network._buffers)
    return any(name in names for names in held) or hasattr(type(network), name)
