"""Which modules are to blame for a difference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import nn

MOST_TRIES = 30  # conversions of the whole network, each compared


def narrowed(
    candidates: Sequence[str], right: Callable[[frozenset[str]], bool]
) -> tuple[str, ...] | None:
    """The few of the candidates without which it is wrong, each found by halving.

    Args:
        candidates: In the order in which they are preferred.
        right: Whether it is right with these; with more than these it is right as well. It is
            asked at most `MOST_TRIES` times.

    Returns:
        More than needed where that is not found in so many tries; None if it is wrong with all.
    """
    tried: dict[frozenset[str], bool] = {}

    def is_right(*paths: str) -> bool:
        asked = frozenset(paths)
        if asked not in tried:
            tried[asked] = right(asked)
        return tried[asked]

    if not is_right(*candidates):
        return None
    needed: list[str] = []
    while len(tried) < MOST_TRIES and not is_right(*needed):
        low, high = 0, len(candidates)  # with the first `high` of them it is right
        while high - low > 1 and len(tried) < MOST_TRIES:
            middle = (low + high) // 2
            if is_right(*needed, *candidates[:middle]):
                high = middle
            else:
                low = middle
        candidates = candidates[:high]
        if high - low == 1:
            needed.append(candidates[-1])
            candidates = candidates[:-1]
    done = tried.get(frozenset(needed), False)
    return tuple(needed) if done else (*needed, *candidates)


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
