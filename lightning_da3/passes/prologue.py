"""What comes before the first host becomes one module that takes the batch in microbatches."""

from __future__ import annotations

from torch import fx

from lightning_da3.config import DA3Config
from lightning_da3.nn.prologue import Prologue
from lightning_da3.passes.freeze import stands_for
from lightning_da3.passes.subgraphs import call_instead_, copied, exits_of
from lightning_da3.planning.flow import Nodes
from lightning_da3.planning.plan import PartPlan
from lightning_da3.tracing.graphs import Part

PLACE = "prologue"


def microbatch_prologue_(part: Part, plan: PartPlan, config: DA3Config) -> None:
    """Put one module in the place of the planned prologue."""
    del config
    if plan.prologue is None:
        return
    gm, names = part.gm, set(plan.prologue.nodes)
    x = next(node for node in gm.graph.nodes if node.name == plan.prologue.source)
    inside: Nodes = {}
    for node in gm.graph.nodes:
        read = [i for i in node.all_input_nodes if i.op != "get_attr"]
        if names & stands_for(node) and read and all(i is x or i in inside for i in read):
            inside[node] = None
    constants = {i: None for node in inside for i in node.all_input_nodes if i.op == "get_attr"}
    inputs = [x, *constants]
    if exits_of(inside):
        piece, _ = copied(inside, inputs)
        module = Prologue(fx.GraphModule(gm, piece), plan.prologue.axes, plan.prologue.growth)
        call_instead_(gm, PLACE, module, inside, inputs)
