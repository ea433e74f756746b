"""Dotted names in the converted network for what takes the place of the user's calls."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from lightning_da3.layers import CONVS, TRANSPOSED, operation
from lightning_da3.tracing.graphs import module_of

_WITH_WEIGHTS = (*CONVS, *TRANSPOSED)


def find_places(gm: fx.GraphModule) -> dict[str, str]:
    """A name for every call, by the name of its node.

    A layer keeps its name: ``layer1.0.relu``, and ``layer1.0.relu_1`` where it is called a second
    time; convolutions keep the same, as their weights are there once. A function is named after
    the module whose forward calls it: ``layer1.0.add``.

    Args:
        gm: A traced network, whose nodes tell which module's forward called them.
    """
    found: dict[str, str] = {}
    taken: set[str] = set()
    for node in gm.graph.nodes:
        if node.op == "call_module":
            name = str(node.target)
            own = name not in taken or isinstance(module_of(gm, node), _WITH_WEIGHTS)
        elif node.op.startswith("call"):
            owner = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
            name = ".".join([*owner[-1:], operation(node).strip("_")]).lstrip(".")
            own = False
        else:
            continue
        found[node.name] = name if own else free_name(name, gm, taken)
        taken.add(found[node.name])
    return found


def free_name(name: str, gm: fx.GraphModule, taken: Iterable[str]) -> str:
    """`name`, with a number behind it if something else has that name."""
    taken, base, count = set(taken), name, 0
    while name in taken or _exists(gm, name):
        count += 1
        name = f"{base}_{count}"
    return name


def _exists(gm: fx.GraphModule, name: str) -> bool:
    value: object = gm
    for part in name.split("."):
        if not hasattr(value, part):
            return False
        value = getattr(value, part)
    return True


def common_owner(places: Iterable[str]) -> str:
    """What the dotted names of several calls have in common, without the calls themselves."""
    owners = [place.split(".")[:-1] for place in places]
    common = []
    for parts in zip(*owners, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)
