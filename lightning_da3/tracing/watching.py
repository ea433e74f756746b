"""What a forward does beside computing: what a graph would lose, or do once and for all."""

from __future__ import annotations

import contextlib
import random
import types
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from lightning_da3.layers import may_draw
from lightning_da3.torch_private.autocast import ENTER, EXIT, ToldOfAutocast
from lightning_da3.torch_private.autograd import version_of
from lightning_da3.torch_private.fake import without_modes
from lightning_da3.torch_private.modules import HOOKS
from lightning_da3.tracing.autocast import Autocast
from lightning_da3.tracing.first_calls import Left, is_plain
from lightning_da3.tracing.hooks import Hooks

_MODULE_STATE = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


class Snapshot:
    """Attributes, buffers and hooks of a module and all in it, to compare with and go back to.

    Args:
        root: It stays what it is.
    """

    def __init__(self, root: nn.Module) -> None:
        # what a ScriptModule holds, no forward in Python changes
        inside = [m for m in root.modules() if not isinstance(m, torch.jit.ScriptModule)]
        self._attributes = {m: _attributes(m) for m in inside}
        self._buffers = {m: dict(m._buffers) for m in inside}
        self.hooks = Hooks(inside)
        self._versions = {id(b): version_of(b) for b in root.buffers()}
        self._contents: dict[int, Tensor] = {id(b): b.detach().clone() for b in root.buffers()}

    def changed(self, module: nn.Module, is_again: Callable[[Any], bool]) -> list[str]:
        """Which attributes and buffers of a module are not what they were.

        Args:
            module: One of those inside.
            is_again: Whether a value is the same in every call, so that a dictionary that gained it
                is a cache: it is emptied of it, and nothing has changed.
        """
        if module not in self._attributes:
            return []
        before, now = self._attributes[module], _attributes(module)
        names = {name for name in {**before, **now} if _differ(before, now, name)}
        for name in names:
            _empty_cache(before.get(name), now.get(name), is_again)
        names = {name for name in names if _differ(before, _attributes(module), name)}
        buffers = self._buffers[module]
        for name, buffer in {**buffers, **module._buffers}.items():
            if module._buffers.get(name) is not buffers.get(name) or (
                buffer is not None and self._versions.get(id(buffer)) != version_of(buffer)
            ):
                names.add(name)
        return sorted(names)

    def is_set_up(self, module: nn.Module, names: Iterable[str]) -> bool:
        """Whether these attributes, which changed, hold plain values now and held none else."""
        before, now = self._attributes[module], vars(module)
        held = [before[name][0] for name in names if name in before]
        return all(name in now and is_plain(now[name]) for name in names) and all(
            is_plain(value) for value in held
        )

    def left(self) -> Left:
        """What a forward has set up since."""
        found = []
        for module, before in self._attributes.items():
            now = _attributes(module)
            names = [n for n in now if _CLOSURE not in n and _differ(before, now, n)]
            found += [(module, name, now[name][0]) for name in names]
        return Left(found, self.hooks.left())

    def restore(
        self, root: nn.Module | None = None, since: int = 0, but: Collection[nn.Module] = ()
    ) -> None:
        """Make a module, and all in it, as it was.

        Args:
            root: By default everything.
            since: Hooks with a smaller number stay.
            but: Modules whose attributes and buffers stay.
        """
        inside = self._attributes if root is None else root.modules()
        self.hooks.restore(since)
        for module in inside:
            if module not in self._attributes or module in but:
                continue  # the first were made while tracing
            before = self._attributes[module]
            for name in set(_attributes(module)) - set(before):
                vars(module).pop(name, None)
            for name, (value, items) in before.items():
                if items is not None:
                    _refill(value, items)
                if _CLOSURE not in name:
                    vars(module)[name] = value
            module._buffers.clear()
            for name, buffer in self._buffers[module].items():
                if buffer is not None and version_of(buffer) != self._versions[id(buffer)]:
                    with torch.no_grad():
                        buffer.copy_(self._contents[id(buffer)])
                    self._versions[id(buffer)] = version_of(buffer)
                module._buffers[name] = buffer


@contextlib.contextmanager
def unchanged(root: nn.Module) -> Iterator[None]:
    """Behind the block a module, and all in it, is as it was."""
    snapshot = Snapshot(root)
    try:
        yield
    finally:
        snapshot.restore()


def _attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Attributes, each with its items if it is a collection, and collections of their functions."""
    found = {
        name: (value, _items(value))
        for name, value in vars(module).items()
        if name not in (*_MODULE_STATE, *HOOKS) and "_constant" not in name
    }
    functions = [(n, v) for n, (v, _) in found.items() if isinstance(v, types.FunctionType)]
    for name, function in functions:
        for variable, cell in zip(
            function.__code__.co_freevars, function.__closure__ or (), strict=True
        ):
            with contextlib.suppress(ValueError):  # of a variable without a value
                if _items(cell.cell_contents) is not None:
                    found[f"{name}{_CLOSURE}{variable}"] = (
                        cell.cell_contents,
                        _items(cell.cell_contents),
                    )
    return found


_CLOSURE = " in "  # between the names of a function and of a variable that it closes over


def _empty_cache(before: Any, now: Any, is_again: Callable[[Any], bool]) -> None:
    """Take out of a dictionary what it gained, if all of that is the same in every call."""
    if before is None or now is None or before[0] is not now[0] or type(before[0]) is not dict:
        return
    cache, items = before
    gained = {key: value for key, value in cache.items() if key not in items}
    if all(cache.get(key) is items[key] for key in items) and all(map(is_again, gained.values())):
        for key in gained:
            del cache[key]


def _items(value: Any) -> Any:
    if type(value) is dict:
        return dict(value)
    return list(value) if type(value) in (list, set) else None


def _refill(value: Any, items: Any) -> None:
    if _items(value) != items if _plain(items) else True:
        value.clear()
        value.extend(items) if isinstance(value, list) else value.update(items)


def _plain(items: Any) -> bool:
    values = [*items.keys(), *items.values()] if isinstance(items, dict) else items
    return all(isinstance(v, (int, float, str, type(None))) for v in values)


def _differ(before: dict[str, Any], now: dict[str, Any], name: str) -> bool:
    if name not in before or name not in now:
        return True
    (old, old_items), (new, new_items) = before[name], now[name]
    if old is not new:
        simple = isinstance(old, (int, float, str, bool)) and type(old) is type(new)
        return not (simple and old == new)
    if old_items is None:
        return False
    if isinstance(old_items, dict):
        if list(old_items) != list(new_items):
            return True
        old_items, new_items = list(old_items.values()), list(new_items.values())
    return len(old_items) != len(new_items) or any(
        a is not b for a, b in zip(old_items, new_items, strict=True)
    )


def random_states() -> tuple[Any, Any]:
    """The states of Python's and NumPy's generators, to compare."""
    kind, keys, *others = np.random.get_state()  # noqa: NPY002
    return random.getstate(), (kind, np.asarray(keys).tobytes(), *others)


def _torch_state() -> Tensor:
    with without_modes():  # of fake tensors
        return torch.get_rng_state()


def _go_back(state: Tensor) -> bool:
    """Set PyTorch's generator to a state; whether it was in another."""
    with without_modes():
        moved = not torch.equal(state, torch.get_rng_state())
        if moved:
            torch.set_rng_state(state)
        return moved


class Modes:
    """The modes of PyTorch that a forward may change for a part of what it computes.

    Args:
        autocast: What the forward wants of autocast.
    """

    def __init__(self, autocast: Autocast) -> None:
        self._autocast = autocast
        self._before = self._now()

    def _now(self) -> tuple[Any, ...]:
        nesting = torch.autocast_increment_nesting() - 1 - self._autocast.idle
        torch.autocast_decrement_nesting()
        return torch.is_grad_enabled(), nesting, torch.is_inference_mode_enabled()

    def changed(self) -> str:
        """What is not as it was, in plain words; "" if nothing is."""
        names = ("whether gradients are on", "autocast", "inference mode")
        pairs = zip(names, self._before, self._now(), strict=True)
        return next((name for name, before, now in pairs if before != now), "")


@contextlib.contextmanager
def plain_modes(autocast: Autocast) -> Iterator[None]:
    """Inside, gradients are on, and autocast and inference mode are off."""
    with torch.inference_mode(False), torch.enable_grad(), autocast.switched_off():
        yield


class Draws(ToldOfAutocast):
    """Inside, what draws random numbers of PyTorch from no traced value is told.

    Args:
        told: Takes a function and its arguments, and returns what the caller gets.
        paused: Whether nothing is told now.
        autocast: Is told of its switches.
    """

    def __init__(
        self, told: Callable[..., Any], paused: Callable[[], bool], autocast: Autocast
    ) -> None:
        TorchFunctionMode.__init__(self)
        self.told, self.paused, self.autocast = told, paused, autocast

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call `func`, unless it says that autocast is switched."""
        del types
        if func in (ENTER, EXIT):
            return self._switched(*args)
        if self.paused():
            return func(*args, **(kwargs or {}))
        before = _torch_state()
        result = func(*args, **(kwargs or {}))
        if isinstance(result, fx.Proxy):
            return result
        if not (_go_back(before) or may_draw(func, args, kwargs or {})):
            return result
        return self.told(func, args, kwargs or {})

    def _switched(self, kind: str = "", dtype: Any = None, enabled: bool = False, *_: Any) -> None:
        del dtype
        if self.paused():
            return
        if kind:
            self.autocast.enter(kind, enabled)
        else:
            self.autocast.exit()
