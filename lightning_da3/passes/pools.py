"""``max_pool(relu(x))`` becomes ``relu(max_pool(x))``: the same, with fewer bits to keep."""

from __future__ import annotations

from torch import fx

from lightning_da3.config import DA3Config
from lightning_da3.nn.frozen import MaxPool, TwoSlopes
from lightning_da3.planning import PartPlan
from lightning_da3.tracing import Part, module_of


def pool_first_(part: Part, plan: PartPlan, config: DA3Config) -> None:
    """Let max pools come before activations that never decrease, where nobody else reads them."""
    del config
    again = {name for segment in plan.segments for name in segment.nodes}
    for pool in list(part.gm.graph.nodes):
        activation = pool.args[0] if pool.args else None
        if not isinstance(activation, fx.Node) or {pool.name, activation.name} & again:
            continue
        slopes = module_of(part.gm, activation)
        if not (isinstance(module_of(part.gm, pool), MaxPool) and isinstance(slopes, TwoSlopes)):
            continue
        x = activation.args[0]
        assert isinstance(x, fx.Node)
        if len(activation.users) > 1 or len(x.users) > 1:
            continue
        pool.args = (x,)
        pool.replace_all_uses_with(activation)
        pool.append(activation)
        activation.args = (pool,)
        slopes.inplace = True  # what a pool returns is new
