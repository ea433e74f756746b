"""Hooks that a forward itself hangs on modules as it runs: a part of what it computes.

They are run with traced values. Those that were there before are the user's, and run when the
network runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_da3.torch_private.modules import BACKWARD_HOOKS, FORWARD_HOOKS, HOOKS

Hung = dict[str, dict[int, Any]]  # hooks of one module by kind and number
_ABSENT = object()


def next_number() -> int:
    """The number that the next hook on any module will have."""
    return RemovableHandle.next_id


class Hooks:
    """The hooks that were on modules before a forward ran.

    Args:
        modules: They stay what they are.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._former = {m: {kind: dict(hooks) for kind, hooks in kinds_of(m)} for m in modules}

    def hung(self, module: nn.Module) -> Hung:
        """The hooks on a module that were not there."""
        former = self._former.get(module, {})
        found = {
            kind: {n: hook for n, hook in hooks.items() if n not in former.get(kind, ())}
            for kind, hooks in kinds_of(module)
        }
        return {kind: hooks for kind, hooks in found.items() if hooks}

    def restore(self, since: int = 0) -> None:
        """Put back what was there, and take off what was not.

        Args:
            since: Hooks with a smaller number stay.
        """
        for module, kinds in self._former.items():
            for kind, hooks in kinds_of(module):
                former = kinds.get(kind, {})
                kept = {n: hook for n, hook in hooks.items() if n in former or n < since}
                if former.keys() - kept.keys():
                    kept = {**former, **kept}
                if kept != hooks:
                    _refill(hooks, kept)

    def left(self) -> list[tuple[dict[int, Any], dict[int, Any]]]:
        """What hooks are held in where they are not those that were there, and those now."""
        return [
            (hooks, dict(hooks))
            for module, kinds in self._former.items()
            for kind, hooks in kinds_of(module)
            if dict(hooks) != kinds.get(kind, {})
        ]


def has_others(module: nn.Module, hung: Hung) -> bool:
    """Whether more than these hooks act when a module is called."""
    acting = [(k, h) for k, h in kinds_of(module) if k in (*FORWARD_HOOKS, *BACKWARD_HOOKS)]
    return any(hooks.keys() - hung.get(kind, {}).keys() for kind, hooks in acting)


def why_not(module: nn.Module, hung: Hung) -> str:
    """Why some of a module's hooks cannot be run around one that runs the others; "" if they can.

    Those are then the last of what runs behind its forward, and the first of what runs before it.
    """
    if any(kind in hung for kind in BACKWARD_HOOKS):
        return "it hooks into the backward pass of a module as it runs"
    kinds = [(vars(module)[kind], hung.get(kind, ())) for kind in FORWARD_HOOKS]
    behind, before = ([number in new for number in hooks] for hooks, new in kinds)
    if behind != sorted(behind) or before != sorted(before, reverse=True):
        return "it hooks into a module, as it runs, that has hooks which were there before"
    return ""


@contextlib.contextmanager
def calling(module: nn.Module, hung: Hung, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, a call of a module runs some of its hooks alone, around another forward.

    Args:
        module: As before afterwards, but for what the hooks do to hooks: some remove themselves.
        hung: Of its hooks.
        forward: Called in the place of the module's own.
    """
    own = vars(module)
    before = {kind: dict(hooks) for kind, hooks in kinds_of(module)}
    former = own.get("forward", _ABSENT)

    def alone(now: Hung) -> None:
        for kind, hooks in kinds_of(module):
            _refill(hooks, now.get(kind, {}))
        own["forward"] = instead

    def put_back() -> Hung:
        now = {kind: dict(hooks) for kind, hooks in kinds_of(module)}
        for kind, hooks in kinds_of(module):
            gone = hung.get(kind, {}).keys() - now[kind].keys()
            kept = {n: hook for n, hook in before[kind].items() if n not in gone}
            _refill(hooks, {**kept, **now[kind]})
        if former is _ABSENT:
            own.pop("forward", None)
        else:
            own["forward"] = former
        return now

    def instead(*args: Any, **kwargs: Any) -> Any:
        now = put_back()
        try:
            return forward(*args, **kwargs)  # which may ask what the module's own gives
        finally:
            alone(now)

    alone(hung)
    try:
        yield
    finally:
        put_back()


def _refill(hooks: dict[int, Any], others: dict[int, Any]) -> None:
    hooks.clear()
    hooks.update(others)


def kinds_of(module: nn.Module) -> Iterator[tuple[str, dict[int, Any]]]:
    """All that a module holds by the numbers of hooks, and its kind."""
    own = vars(module)
    for kind in HOOKS:
        if isinstance(own.get(kind), dict):
            yield kind, own[kind]
