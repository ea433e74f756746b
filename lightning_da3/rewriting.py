"""Traced network + plan to a rewritten one. Decides nothing."""

from __future__ import annotations

from torch import fx

from lightning_da3.config import DA3Config
from lightning_da3.passes import ORDER
from lightning_da3.planning import Plan


def rewrite(gm: fx.GraphModule, plan: Plan, config: DA3Config) -> fx.GraphModule:
    """Apply every pass to `gm`, in order.

    Args:
        gm: A traced network; edited in place.
        plan: Made for this very network.
        config: The user's choices.

    Returns:
        `gm`, whose forward now returns ``(output, executed)``.
    """
    for edit_ in ORDER:
        edit_(gm, plan, config)
    gm.graph.lint()
    gm.recompile()
    return gm
