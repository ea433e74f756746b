"""One kind of edit each: reads the plan, decides nothing. The order is written once, here.

Every pass takes the traced network and the plan, and edits the network in place. Nodes keep their
names throughout, which is how the plan speaks of them.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from lightning_da3.config import DA3Config
from lightning_da3.passes.freeze import freeze_
from lightning_da3.passes.head import own_head_
from lightning_da3.passes.hosts import attach_hosts_
from lightning_da3.planning import Plan

Pass = Callable[[fx.GraphModule, Plan, DA3Config], None]

ORDER: tuple[Pass, ...] = (freeze_, attach_hosts_, own_head_)
