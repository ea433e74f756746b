"""``head(x)`` becomes ``slot(x)``: the active domain's classifier, or the backbone's own."""

from __future__ import annotations

from typing import cast

from torch import fx

from lightning_da3.config import DA3Config
from lightning_da3.nn.head import Head, HeadSlot
from lightning_da3.planning import Plan


def own_head_(gm: fx.GraphModule, plan: Plan, config: DA3Config) -> None:
    """Put a slot where the plan found the classifier."""
    del config
    if plan.head is not None:
        gm.set_submodule(plan.head, HeadSlot(cast(Head, gm.get_submodule(plan.head))))
