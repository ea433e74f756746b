"""Names of residual branches: what users, files and checkpoints give, and what follows."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from lightning_da3.errors import CheckpointError, ConfigError
from lightning_da3.formatting import shown
from lightning_da3.planning.plan import Plan


def ordered_branches(plan: Plan, branches: Any) -> tuple[str, ...]:
    """The names of branches in the order of the plan, each once.

    Raises:
        ConfigError: They are no names, or there are no such branches.
    """
    listed = isinstance(branches, Collection) and not isinstance(branches, (str, Mapping))
    if not (listed and all(isinstance(name, str) for name in branches)):
        raise ConfigError(
            f"`branches` must be a list of names of branches, got {shown(branches)}. "
            "`model.plan.branches` has them."
        )
    known = [branch.name for branch in plan.branches]
    unknown = sorted(set(branches) - set(known))
    if unknown:
        able = f"It can skip {known}." if known else nothing_to_skip(plan)
        raise ConfigError(f"{plan.network} cannot skip {unknown}. {able}")
    return tuple(name for name in known if name in branches)


def nothing_to_skip(plan: Plan) -> str:
    """Why a network can skip nothing, for people."""
    return (
        f"{plan.network} has no residual branch that can be skipped: nothing of it is computed as "
        "x + f(x), with f(x) of the shape of x and read by nothing else, where shapes are known "
        "(give `example_inputs` to `convert`)."
    )


def closed_hosts(plan: Plan, skipped: Collection[str]) -> tuple[str, ...]:
    """The names of the hosts inside of branches, in the order of the plan."""
    closed = {host for branch in plan.branches if branch.name in skipped for host in branch.hosts}
    return tuple(host.name for host in plan.hosts if host.name in closed)


def check_saved(plan: Plan, extra: Mapping[str, Any]) -> None:
    """Refuse branches that a state's domains skip and a network does not have.

    Args:
        plan: The network's.
        extra: What the state says beside its tensors.

    Raises:
        CheckpointError: There are such.
    """
    try:
        for name, branches in extra.get("skipped", {}).items():
            if name in extra["num_classes"]:
                ordered_branches(plan, branches)
    except (ConfigError, AttributeError) as error:
        raise CheckpointError(
            f"The checkpoint does not fit this model: a domain of it skips other branches. {error}"
        ) from error
