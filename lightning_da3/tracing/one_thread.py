"""Tracing in one thread leaves the calls of all others alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import fx, nn

_tracing = threading.RLock()  # torch.fx edits `nn.Module` while it traces, and puts back what was


class OneThread(fx.Tracer):
    """A tracer that sees the modules of its own thread. Others wait until they may trace, too."""

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """The graph of `root`."""
        with _tracing:
            self._thread = threading.get_ident()
            return super().trace(root, concrete_args)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """What a module returns: to another thread, that of any network."""
        if not self.is_here():
            return forward(*args, **kwargs)
        return self.call_here(m, forward, args, kwargs)

    def call_here(
        self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """What a module of the traced network returns."""
        return super().call_module(m, forward, args, kwargs)

    def is_here(self) -> bool:
        """Whether the thread that traces asks."""
        return self._thread == threading.get_ident()
