"""What comes before the first host becomes one module that takes the batch in pieces."""

from __future__ import annotations

import operator

from torch import fx

from lightning_da3.config import DA3Config
from lightning_da3.nn.start import InPieces
from lightning_da3.passes.freeze import STANDS_FOR, stands_for
from lightning_da3.planning import PartPlan
from lightning_da3.tracing import Part

PLACE = "start_in_pieces"


def start_in_pieces_(part: Part, plan: PartPlan, config: DA3Config) -> None:
    """Put one module in the place of the planned start."""
    del config
    if plan.start is None:
        return
    gm, graph = part.gm, part.gm.graph
    names, x = set(plan.start.nodes), next(n for n in graph.nodes if n.name == plan.start.source)
    inside: dict[fx.Node, None] = {}
    for node in graph.nodes:
        read = [i for i in node.all_input_nodes if i.op != "get_attr"]
        if names & stands_for(node) and read and all(i is x or i in inside for i in read):
            inside[node] = None
    exits = [node for node in inside if any(user not in inside for user in node.users)]
    constants = {i: None for node in inside for i in node.all_input_nodes if i.op == "get_attr"}
    if not exits:
        return

    piece = fx.Graph()
    copies = {i: piece.placeholder(i.name) for i in (x, *constants)}
    for node in inside:
        copies[node] = piece.node_copy(node, copies.__getitem__)
    piece.output(tuple(copies[node] for node in exits))
    start = InPieces(fx.GraphModule(gm, piece), plan.start.axes, plan.start.growth)
    gm.add_submodule(PLACE, start)

    first = next(iter(inside))
    for constant in constants:
        first.prepend(constant)
    with graph.inserting_before(first):
        call = graph.call_module(PLACE, (x, *constants))
        results = [graph.call_function(operator.getitem, (call, k)) for k in range(len(exits))]
    for node, result in zip(exits, results, strict=True):
        result.meta[STANDS_FOR] = stands_for(node)
        node.replace_all_uses_with(result, delete_user_cb=lambda user: user not in inside)
    for node in reversed(inside):
        graph.erase_node(node)
