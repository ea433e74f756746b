"""Whether domains and models were made with the same config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

CONFIG_PARTS = ("adapter", "gate", "head")  # that a domain must have been learned with
WHERE = ("min_stride", "min_depth")  # hosts are; which hosts that gives, the plan says


def config_differences(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> Iterator[str]:
    """What a domain's config and a model's must have in common and have not, for people.

    Where hosts are may have been said otherwise, as long as they are the same.
    """
    for key in CONFIG_PARTS:
        if key in theirs and _anywhere(theirs[key]) != _anywhere(mine[key]):
            yield (
                f"Its config has {key}={theirs[key]}, here it is {mine[key]}. Convert with the "
                "config that it was learned with."
            )
    weights = [config.get("memory", {}).get("weights", "same") for config in (theirs, mine)]
    if weights[0] != weights[1]:
        yield (
            f"It was learned with MemoryConfig(weights={weights[0]!r}), here it is {weights[1]!r}: "
            "rounded weights are another backbone. Convert with the config that it was learned "
            "with."
        )


def _anywhere(part: Any) -> Any:
    """A part of a config without where hosts are."""
    if not isinstance(part, Mapping):
        return part
    return {name: value for name, value in part.items() if name not in WHERE}
