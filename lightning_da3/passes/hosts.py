"""``y = f(x)`` becomes ``x, a = host_input(x); y, e = host_output(f(x), a)``."""

from __future__ import annotations

import operator
from typing import cast

from torch import fx

from lightning_da3.config import DA3Config
from lightning_da3.nn.adapter import HostInput, HostOutput
from lightning_da3.planning import HostPlan, Plan
from lightning_da3.tracing import output_node

INPUTS, OUTPUTS = "host_inputs", "host_outputs"


def host_key(name: str) -> str:
    """A host's name as one attribute name: dots and colons cannot stand in one."""
    return name.replace(".", "__").replace(":", "__call")


def attach_hosts_(gm: fx.GraphModule, plan: Plan, config: DA3Config) -> None:
    """Put an input and an output around every host, and hand out what was executed.

    The network's output ``y`` becomes ``(y, [e1, e2, ..])``.
    """
    folded = {step.name: step.fold_into for step in plan.nodes if step.fold_into}
    nodes = {node.name: node for node in gm.graph.nodes}
    executed = []
    for host in plan.hosts:
        last = folded.get(host.last) or host.last
        executed.append(_attach(gm, host, nodes[host.first], nodes[last], config))
    output = output_node(gm.graph)
    output.args = ((output.args[0], executed),)


def _attach(
    gm: fx.GraphModule, host: HostPlan, first: fx.Node, last: fx.Node, config: DA3Config
) -> fx.Node:
    key = host_key(host.name)
    gm.add_submodule(f"{INPUTS}.{key}", HostInput(config.adapter.max_cells, host.stride))
    gm.add_submodule(
        f"{OUTPUTS}.{key}", HostOutput(host.macs_per_output, exact=config.memory.exact)
    )
    graph = gm.graph
    x = cast(fx.Node, first.args[0])
    with graph.inserting_before(first):
        entry = graph.call_module(f"{INPUTS}.{key}", (x,))
        through = graph.call_function(operator.getitem, (entry, 0))
        adapted = graph.call_function(operator.getitem, (entry, 1))
    first.replace_input_with(x, through)
    with graph.inserting_after(last):
        exit_ = graph.call_module(f"{OUTPUTS}.{key}", (last, adapted))
    with graph.inserting_after(exit_):
        executed = graph.call_function(operator.getitem, (exit_, 1))
        y = graph.call_function(operator.getitem, (exit_, 0))
    last.replace_all_uses_with(y, delete_user_cb=lambda user: user is not exit_)
    return executed
