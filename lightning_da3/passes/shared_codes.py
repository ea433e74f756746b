"""``y = silu(x); host_input(y)`` becomes ``s = wanted(x); y = silu(x, s); host_input(y, s)``.

So an activation keeps codes of its input, and the adapters that read its value keep nothing of it,
where the plan allows that and a call has use of it.
"""

from __future__ import annotations

from typing import cast

from lightning_da3.config import DA3Config
from lightning_da3.nn.adapter import HostInput
from lightning_da3.nn.shared_codes import CodesWanted
from lightning_da3.passes.hosts import INPUTS, host_key
from lightning_da3.planning.plan import PartPlan
from lightning_da3.tracing.graphs import Part

WANTED = "codes_wanted"


def share_codes_(part: Part, plan: PartPlan, config: DA3Config) -> None:
    """Let hosts' inputs and the planned activations in front of them share codes."""
    del config
    graph = part.gm.graph
    nodes = {node.name: node for node in graph.nodes}
    doors = {str(node.target): node for node in graph.nodes if node.op == "call_module"}
    readers: dict[str, list[str]] = {}
    for host in plan.hosts:
        if host.codes_from is not None:
            key = f"{INPUTS}.{host_key(host.name)}"
            readers.setdefault(host.codes_from, []).append(key)
    for name, keys in readers.items():
        activation = nodes[name]
        hosts = [cast(HostInput, part.gm.get_submodule(key)) for key in keys]
        part.gm.add_submodule(f"{WANTED}.{name}", CodesWanted(hosts))
        with graph.inserting_before(activation):
            shared = graph.call_module(f"{WANTED}.{name}", activation.args[:1])
        activation.kwargs = {**activation.kwargs, "shared": shared}
        for key in keys:
            doors[key].args = (doors[key].args[0], shared)
