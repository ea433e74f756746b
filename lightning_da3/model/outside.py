"""A set of tensors that train beside a network, in the module that holds it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class Outside(nn.Module):
    """Tensors of a module and of the modules inside it, under the names that they have there.

    While a set is in use its parameters are the module's own, and registered there alone: they are
    named, counted and given to optimizers once. State dicts have them here, too.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lent: dict[str, nn.Parameter | None] = {}

    @contextmanager
    def _whole(self) -> Iterator[None]:
        self._parameters.update(self._lent)
        try:
            yield
        finally:
            for name in self._lent:
                del self._parameters[name]

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with self._whole():
            super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with self._whole():
            super()._load_from_state_dict(*args, **kwargs)


# no methods: they would take names that modules of users may have


def lend_(outside: Outside, names: Iterable[str]) -> None:
    """Leave parameters of a set to the module that computes with them, by dotted name."""
    for name in names:
        path, _, leaf = name.rpartition(".")
        node = outside.get_submodule(path)
        assert isinstance(node, Outside)
        node._lent[leaf] = node._parameters.pop(leaf)


def take_back_(outside: Outside | None) -> None:
    """Let a set have all of its parameters again."""
    for node in () if outside is None else outside.modules():
        assert isinstance(node, Outside)
        node._parameters.update(node._lent)
        node._lent.clear()


def outside_with(tensors: Mapping[str, Tensor]) -> Outside | None:
    """A set of these tensors, not of copies, by dotted name; None if there are none."""
    made = Outside()
    for name, tensor in tensors.items():
        *path, leaf = name.split(".")
        node: nn.Module = made
        for part in path:
            if part not in dict(node.named_children()):
                node.add_module(part, Outside())
            node = node.get_submodule(part)
        if isinstance(tensor, nn.Parameter):
            node.register_parameter(leaf, tensor)
        else:
            node.register_buffer(leaf, tensor)
    return made if tensors else None


def tensors_of(outside: Outside | None) -> dict[str, Tensor]:
    """The tensors of a set by dotted name, in use or not; parameters are themselves."""
    return {} if outside is None else dict(outside.state_dict(keep_vars=True))


def with_room(
    outside: Outside | None, tensors: Mapping[str, Tensor], like: Outside | None
) -> Outside | None:
    """A set with a place for every tensor that is about to be loaded into it.

    Args:
        outside: What there is already; must not be in use.
        tensors: By name; only shapes and types are looked at.
        like: A set with places of the same names, if there is one; else all become buffers.
    """
    places, known = tensors_of(outside), tensors_of(like)
    for name, tensor in tensors.items():
        if name not in places:
            places[name] = copied(known.get(name, tensor), {})
    return outside_with(places)


def copied(tensor: Tensor, memo: dict[int, Tensor]) -> Tensor:
    """A copy that is not trained; tensors that are one stay one.

    Args:
        tensor: A parameter or a buffer.
        memo: What was copied before, by identity.
    """
    if id(tensor) not in memo:
        own = tensor.detach().clone()
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(own, requires_grad=False) if is_parameter else own
    return memo[id(tensor)]


def typed(outside: Outside | None, like: Mapping[str, Tensor]) -> Outside | None:
    """A set in which parameters are parameters, if it was loaded while nothing told which are."""
    tensors = tensors_of(outside)
    for name, tensor in tensors.items():
        if isinstance(like.get(name), nn.Parameter) and not isinstance(tensor, nn.Parameter):
            tensors[name] = nn.Parameter(tensor, requires_grad=False)
    return outside_with(tensors)
