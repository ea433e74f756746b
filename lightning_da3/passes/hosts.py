"""``y = f(x)`` becomes ``x, a, c = host_input(x); y, e = host_output(f(x), a)``."""

from __future__ import annotations

import operator

from torch import fx

from lightning_da3.config import DA3Config
from lightning_da3.nn.adapter import HostInput, HostOutput
from lightning_da3.nn.gate import Recorder
from lightning_da3.planning.plan import HostPlan, PartPlan
from lightning_da3.tracing.graphs import Part

INPUTS, OUTPUTS, RECORDERS = "host_inputs", "host_outputs", "recorders"


def host_key(name: str) -> str:
    """A host's name as one attribute name: dots and colons cannot stand in one."""
    return name.replace(".", "__").replace(":", "__call")


def attach_hosts_(part: Part, plan: PartPlan, config: DA3Config) -> None:
    """Put an input and an output around every host, and a recorder of what was executed."""
    nodes = {node.name: node for node in part.gm.graph.nodes}
    for host in plan.hosts:  # in the order of data: what one wrote, the next one reads
        nodes[host.last] = _attach(part.gm, host, nodes, config)


def _attach(
    gm: fx.GraphModule, host: HostPlan, nodes: dict[str, fx.Node], config: DA3Config
) -> fx.Node:
    """The node whose value is the host's output, with what was added."""
    key, cells, tokens = host_key(host.name), config.adapter.max_cells, host.stride is None
    gm.add_submodule(
        f"{INPUTS}.{key}",
        HostInput(host.name, cells, host.stride, host.prefix_tokens, host.samples),
    )
    gm.add_submodule(
        f"{OUTPUTS}.{key}",
        HostOutput(
            host.macs_per_output,
            config.memory.exact,
            cells,
            host.prefix_tokens if tokens else None,
            host.inplace,
            host.samples,
        ),
    )
    gm.add_submodule(f"{RECORDERS}.{key}", Recorder(host.name))
    graph = gm.graph
    readers = [nodes[name] for name in host.readers]
    x, last = nodes[host.source], nodes[host.last]
    with graph.inserting_before(readers[0]):
        entry = graph.call_module(f"{INPUTS}.{key}", (x,))
        through = graph.call_function(operator.getitem, (entry, 0))
        adapted = graph.call_function(operator.getitem, (entry, 1))
    for reader in readers:
        reader.replace_input_with(x, through)
    with graph.inserting_after(last):
        exit_ = graph.call_module(f"{OUTPUTS}.{key}", (last, adapted))
    with graph.inserting_after(exit_):
        macs = graph.call_function(operator.getitem, (exit_, 2))
        gate = graph.call_function(operator.getitem, (exit_, 1))
        y = graph.call_function(operator.getitem, (exit_, 0))
    last.replace_all_uses_with(y, delete_user_cb=lambda user: user is not exit_)
    with graph.inserting_after(macs):
        graph.call_module(f"{RECORDERS}.{key}", (gate, macs))
    return y
