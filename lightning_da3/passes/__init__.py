"""One kind of edit each: reads the plan, decides nothing. The order is written once, here.

Every pass takes one traced graph and its plan, and edits the graph in place. Nodes keep their
names throughout, which is how the plan speaks of them.
"""

from __future__ import annotations

from collections.abc import Callable

from lightning_da3.config import DA3Config
from lightning_da3.passes.freeze import freeze_
from lightning_da3.passes.hosts import attach_hosts_
from lightning_da3.passes.means import compute_means_again_
from lightning_da3.passes.prologue import prologue_
from lightning_da3.passes.recompute import recompute_
from lightning_da3.passes.views import reshape_
from lightning_da3.planning.plan import PartPlan
from lightning_da3.tracing.graphs import Part

Pass = Callable[[Part, PartPlan, DA3Config], None]

ORDER: tuple[Pass, ...] = (
    reshape_,
    attach_hosts_,
    freeze_,
    compute_means_again_,
    recompute_,
    prologue_,
)
