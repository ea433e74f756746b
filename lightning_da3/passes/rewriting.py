"""Traced network + plan to a rewritten one. Decides nothing."""

from __future__ import annotations

from typing import cast

from torch import nn

from lightning_da3.config import DA3Config
from lightning_da3.nn.head import Head, HeadSlot
from lightning_da3.nn.linear import freeze_linear_layers_
from lightning_da3.passes import ORDER
from lightning_da3.passes.stored_weights import store_weights_in_bfloat16_
from lightning_da3.planning.plan import Plan
from lightning_da3.tracing.graphs import Traced


def rewrite(traced: Traced, plan: Plan, config: DA3Config) -> nn.Module:
    """Apply every pass to every graph, in order, and put a slot where the classifier was.

    Args:
        traced: A traced network; edited in place.
        plan: Made for this very network.
        config: The user's choices.

    Returns:
        Its root.
    """
    if plan.head is not None:  # first: what is computed again refers to the slot
        head = cast(Head, traced.root.get_submodule(plan.head))
        traced.root.set_submodule(plan.head, HeadSlot(head))
    for part, planned in zip(traced.parts, plan.parts, strict=True):
        if config.memory.stored_dtype is not None:
            store_weights_in_bfloat16_(part, plan.head)
        for edit_ in ORDER:
            edit_(part, planned, config)
        part.gm.graph.lint()
        part.gm.recompile()
    freeze_linear_layers_(traced.root)
    return traced.root
