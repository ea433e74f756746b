"""Which modules are to blame for a difference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache

from torch import nn


def narrowed(
    candidates: Sequence[str], right: Callable[[frozenset[str]], bool]
) -> tuple[str, ...] | None:
    """The few of the candidates without which it is wrong, each found by halving.

    Args:
        candidates: In the order in which they are preferred.
        right: Whether it is right with these; with more than these it is right as well.

    Returns:
        None if it is wrong with all of them.
    """
    right = cache(right)
    if not right(frozenset(candidates)):
        return None
    needed: list[str] = []
    while not right(frozenset(needed)):
        low, high = 0, len(candidates)  # with the first `high` of them it is right
        while high - low > 1:
            middle = (low + high) // 2
            if right(frozenset((*needed, *candidates[:middle]))):
                high = middle
            else:
                low = middle
        needed.append(candidates[high - 1])
        candidates = candidates[: high - 1]
    return tuple(needed)


def holders(network: nn.Module) -> Iterator[str]:
    """Modules that hold others, what holds more first."""
    return _paths(network, leaves=False)


def modules(network: nn.Module) -> Iterator[str]:
    """All modules, single layers last."""
    yield from _paths(network, leaves=False)
    yield from _paths(network, leaves=True)


def _paths(network: nn.Module, *, leaves: bool) -> Iterator[str]:
    """Names in the traced copy, in which nothing is compiled or parametrized any more."""
    seen: set[str] = set()
    for name, module in network.named_modules():
        path = ".".join(part for part in name.split(".") if part != "_orig_mod")
        if "parametrizations" in path.split(".") or path in seen:
            continue
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            continue
        if any(True for _ in module.children()) is not leaves:
            seen.add(path)
            yield path
