"""A tracer that sees what a graph cannot hold, and gives up on the smallest part that does it."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from types import CodeType
from typing import Any

from torch import fx, nn

from lightning_da3.tracing import frames
from lightning_da3.tracing.one_thread import OneThread
from lightning_da3.tracing.refusals import CannotTrace, NewLeaf, first_line
from lightning_da3.tracing.values import Value, is_of_weights
from lightning_da3.tracing.watching import Snapshot, random_states


class Watched(OneThread):
    """A tracer that compares the network, and all else that a forward may change, with before.

    Args:
        leaves: Why a function is one node, by its code.
        may_set_up: Whether what holds plain values may be left with others, in its first call.

    Attributes:
        erased: Nodes that went with the forward of a module that is one node now.
    """

    _snapshot: Snapshot

    def __init__(self, leaves: dict[CodeType, str] | None, *, may_set_up: bool) -> None:
        super().__init__()
        self.leaves = {} if leaves is None else leaves
        self.may_set_up = may_set_up
        self.erased: set[fx.Node] = set()
        self._refused: CannotTrace | None = None
        self._made: list[weakref.ref[Value]] = []
        self._forwards = frames.forwards_of_functions()

    @property
    def running(self) -> list[nn.Module]:
        """The modules whose forwards run, outermost first; the traced one is not among them."""
        return [self.root.get_submodule(path) for path, _ in self.module_stack.values()]

    def cannot(self, reason: str) -> None:
        """Give up on the smallest function or module that runs.

        Raises:
            CannotTrace: Always.
        """
        here = self._frames()
        reason, line = frames.what_packs(here) or reason, frames.place(here)
        self._refused = CannotTrace(f"{reason} ({line})" if line else reason)
        raise self._refused

    def look_into(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a module's forward, and see that it does nothing that a graph would lose."""
        before = random_states()
        result = forward(*args, **kwargs)
        self._check_done(m, before)
        self._check_unchanged(m)
        return result

    def _check_done(self, m: nn.Module, before: Any) -> None:
        if self._refused is not None:
            raise self._refused  # the forward went on with something else
        if random_states() != before:
            self.cannot(f"{type(m).__name__} draws random numbers of Python or NumPy")

    def _check_unchanged(self, m: nn.Module) -> None:
        changed = self._snapshot.changed(m, is_of_weights)
        if changed and not (self.may_set_up and self._snapshot.is_set_up(m, changed)):
            raise CannotTrace(f"its forward changes the attributes {changed}")

    def _check_gone(self) -> None:
        """Values that outlive the forward are where its callers look for more than its output."""
        if any(ref() is not None for ref in self._made):
            gc.collect()
        kept = [value for ref in self._made if (value := ref()) is not None]
        names = [value.node.name for value in kept if value.node not in self.erased]
        if names:
            raise CannotTrace(f"it leaves what it computed where others may find it: {names[:4]}")

    def _refine(self, error: Exception) -> None:
        """Look for a function, inside of what failed, that may be the node."""
        inner = frames.innermost_module(frames.frames_of(error), self.look_into.__func__.__code__)  # type: ignore[attr-defined]
        if code := frames.leafable(inner, self.leaves, self._forwards):
            raise NewLeaf(code, f"function {code.co_name}: {first_line(error)}") from error

    def _frames(self) -> list[Any]:
        """The frames of the innermost module's forward that runs."""
        code = Watched.look_into.__code__ if self.module_stack else self.trace.__func__.__code__  # type: ignore[attr-defined]
        return frames.innermost_module(frames.frames_above(sys._getframe(1)), code)
