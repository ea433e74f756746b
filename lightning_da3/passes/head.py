"""``fc(x)`` becomes ``slot(x)``: the active domain's classifier, or the original one."""

from __future__ import annotations

from typing import cast

from lightning_da3.config import DA3Config
from lightning_da3.nn.head import Head, HeadSlot
from lightning_da3.planning.plan import Plan
from lightning_da3.tracing.graph_modules import LAYER, UserGraph
from lightning_da3.tracing.graphs import Traced


def put_slot_(traced: Traced, plan: Plan, config: DA3Config) -> None:
    """Put a slot where the planned classifier is."""
    del config
    if plan.head is not None:
        place = plan.head
        layer = traced.root.get_submodule(place)
        if isinstance(layer, UserGraph):  # of this layer alone
            place = f"{place}.{LAYER}"
            layer = traced.root.get_submodule(place)
        traced.root.set_submodule(place, HeadSlot(cast(Head, layer)))
        for part in traced.parts:
            for node in part.gm.graph.nodes:  # what a forward asks of the classifier's weights
                owner, _, name = str(node.target).rpartition(".")
                if node.op == "get_attr" and part.user_name(owner) == plan.head:
                    node.target = f"{owner}.original.{name}"
