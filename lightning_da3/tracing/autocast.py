"""Autocast that a forward switches off, or asks for, where it is off anyway.

That changes nothing, so it can be traced through. The graph checks in every call that it is off.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from lightning_da3.tracing.guards import autocast_must_be_off

# functions of torch that say what autocast is, and would say something else in other calls
ASKED = (
    *("is_autocast_enabled", "is_autocast_cpu_enabled"),
    *("get_autocast_dtype", "get_autocast_gpu_dtype", "get_autocast_cpu_dtype"),
)
_KINDS = ("cpu", "cuda", "mps", "xpu")

Precision = tuple[tuple[str, torch.dtype], ...]
"""Where autocast is on: types of devices, each with what it lowers to. Empty: nowhere."""


def _available() -> list[str]:
    return [kind for kind in _KINDS if torch.amp.is_autocast_available(kind)]


def precision_now() -> Precision:
    """Where autocast is on by now."""
    on = [kind for kind in _available() if torch.is_autocast_enabled(kind)]
    return tuple((kind, torch.get_autocast_dtype(kind)) for kind in on)


@contextlib.contextmanager
def in_precision(precision: Precision) -> Iterator[None]:
    """Inside, autocast is on there, and nowhere else."""
    off = [kind for kind, _ in precision_now() if kind not in dict(precision)]
    with contextlib.ExitStack() as stack:
        for kind in off:
            stack.enter_context(torch.autocast(kind, enabled=False))
        for kind, dtype in precision:
            stack.enter_context(torch.autocast(kind, dtype))
        yield


class Autocast:
    """What a traced forward wants of autocast.

    Attributes:
        off: Types of devices for which it must be off, as it was found off.
    """

    def __init__(self) -> None:
        self._on = {kind for kind, _ in precision_now()}
        self._entered: list[bool] = []  # whether that changed nothing, outermost first
        self.off: set[str] = set()

    @contextlib.contextmanager
    def switched_off(self) -> Iterator[None]:
        """Inside, autocast is off."""
        with contextlib.ExitStack() as stack:
            for kind in {"cpu", *self._on}:
                stack.enter_context(torch.autocast(kind, enabled=False))
            yield

    def is_off(self, kind: str) -> bool:
        """Whether autocast is off for a type of device where the network is traced; noted if so."""
        if kind in self._on or torch.is_autocast_enabled(kind):
            return False
        self.off.add(kind)
        return True

    def enter(self, kind: str, enabled: bool) -> None:
        """Note that it is switched."""
        self._entered.append(not enabled and all(self._entered) and self.is_off(kind))

    def exit(self) -> None:
        """Note that it is switched back."""
        self._entered.pop()

    @property
    def idle(self) -> int:
        """How many of those that are entered changed nothing."""
        return sum(self._entered)

    def check_(self, graph: fx.Graph) -> None:
        """Put checks before everything that a graph computes."""
        first = next(node for node in graph.nodes if node.op != "placeholder")
        with graph.inserting_before(first):
            for kind in sorted(self.off):
                check = graph.call_function(autocast_must_be_off, (kind,))
                check.meta["is_wrapped"] = True


def kind_asked(function: Any, args: Any, kwargs: Any) -> Any:
    """The type of device that one of `ASKED` is asked about."""
    given = [*args, *kwargs.values()]
    return given[0] if given else "cpu" if "_cpu_" in function.__name__ else "cuda"
