"""Makes the rewritten network from a traced one and its plan. Decides nothing.

Every pass takes all traced graphs, which it edits in place, and the plan. Nodes keep their names
throughout, which is how the plan speaks of them.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from lightning_da3.config import DA3Config
from lightning_da3.passes.freeze import freeze_
from lightning_da3.passes.head import put_slot_
from lightning_da3.passes.hosts import attach_hosts_
from lightning_da3.passes.linear import freeze_linear_layers_
from lightning_da3.passes.means import compute_means_again_
from lightning_da3.passes.prologue import microbatch_prologue_
from lightning_da3.passes.recompute import recompute_
from lightning_da3.passes.shared_codes import share_codes_
from lightning_da3.passes.stored_weights import store_weights_
from lightning_da3.passes.views import reshape_
from lightning_da3.planning.plan import PartPlan, Plan
from lightning_da3.tracing.graphs import Part, Traced

Pass = Callable[[Traced, Plan, DA3Config], None]


def in_every_part(edit_: Callable[[Part, PartPlan, DA3Config], None]) -> Pass:
    """The pass that makes an edit in every traced graph."""

    def edit_parts_(traced: Traced, plan: Plan, config: DA3Config) -> None:
        for part, planned in zip(traced.parts, plan.parts, strict=True):
            edit_(part, planned, config)

    return edit_parts_


ORDER: tuple[Pass, ...] = (
    put_slot_,  # first: what is computed again refers to the slot
    in_every_part(store_weights_),
    in_every_part(reshape_),
    in_every_part(attach_hosts_),
    in_every_part(freeze_),
    in_every_part(compute_means_again_),
    in_every_part(share_codes_),
    in_every_part(recompute_),
    in_every_part(microbatch_prologue_),
    freeze_linear_layers_,
)


def rewrite(traced: Traced, plan: Plan, config: DA3Config) -> nn.Module:
    """Apply every pass, in order.

    Args:
        traced: A traced network; edited in place.
        plan: The plan of this network.
        config: The user's choices.

    Returns:
        The root of the rewritten network.
    """
    for edit_ in ORDER:
        edit_(traced, plan, config)
    for part in traced.parts:
        part.gm.graph.lint()
        part.gm.recompile()
    return traced.root
