"""``linear(x)`` and ``attention(x, x, x)`` become the same with weights stored in bfloat16."""

from __future__ import annotations

from lightning_da3.config import DA3Config
from lightning_da3.nn.linear import FROZEN, store_weights_of_
from lightning_da3.planning.plan import PartPlan
from lightning_da3.tracing.graphs import Part, module_of


def store_weights_(part: Part, plan: PartPlan, config: DA3Config) -> None:
    """Store the planned weights of linear layers and attention; convolutions store their own."""
    stored = {step.name for step in plan.nodes if step.stored}
    for node in part.gm.graph.nodes:
        layer = module_of(part.gm, node) if node.name in stored else None
        if layer is not None and type(layer) in FROZEN and config.memory.stored_dtype is not None:
            store_weights_of_(layer, config.memory.stored_dtype)
