"""The hosts of a whole network, found again in a graph of a part of it or of another method."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_da3.planning.hosts import HostFinder
from lightning_da3.planning.places import find_places
from lightning_da3.planning.plan import HostPlan, PartPlan, Plan
from lightning_da3.tracing.graphs import Part


def hosts_found_again(
    part: Part, finder: HostFinder, candidates: Sequence[HostPlan], plan: Plan
) -> list[HostPlan]:
    """The hosts that a plan has as well, from the same layer to the same.

    Args:
        part: The graph.
        finder: Of its hosts.
        candidates: What it found.
        plan: That of the whole network.
    """
    known = [
        (host, ends)
        for other in plan.parts
        for host, ends in zip(other.hosts, _ends(other.hosts, _places(other)), strict=True)
    ]
    places = find_places(part.gm)
    # the graph of one layer calls it by a name of its own
    whole = {name: part.path if part.single else part.user_name(p) for name, p in places.items()}
    again: list[HostPlan] = []
    for found in (list(candidates), list(finder.any_layers())):
        again = [
            dataclasses.replace(host, macs_per_output=same.macs_per_output)
            for host, own in zip(found, _ends(found, whole), strict=True)
            for same, theirs in known
            if _are_same(host, own, same, theirs)
        ]
        if again:
            break
    return again


def _are_same(
    host: HostPlan, ends: Sequence[str | None], other: HostPlan, others: Sequence[str | None]
) -> bool:
    """Whether two hosts are; where one ends, a module may be one node that the other looks into."""
    return _about(host) == _about(other) and all(
        _holds(end, there) or _holds(there, end) for end, there in zip(ends, others, strict=True)
    )


def _holds(place: str | None, other: str | None) -> bool:
    """Whether a place is another, or a module that has it."""
    return place == other or (place is not None and f"{other}.".startswith(f"{place}."))


def _about(host: HostPlan) -> tuple[Any, ...]:
    return host.name, host.in_channels, host.out_channels, host.stride


def _places(part: PartPlan) -> dict[str, str]:
    return {node.name: f"{part.path}.{node.place}".lstrip(".") for node in part.nodes}


def _ends(
    hosts: Sequence[HostPlan], places: Mapping[str, str]
) -> list[tuple[str | None, str | None]]:
    """Where hosts begin and end."""
    return [(places.get(host.readers[0]), places.get(host.last)) for host in hosts]
