"""``x.view(..)`` becomes ``x.reshape(..)``: frozen convolutions give channels_last maps.

Of these not every view exists that a contiguous map has.
"""

from __future__ import annotations

import torch

from lightning_da3.config import DA3Config
from lightning_da3.planning import PartPlan
from lightning_da3.tracing import Part

_INSTEAD = {"view": "reshape", "view_as": "reshape_as"}


def reshape_(part: Part, plan: PartPlan, config: DA3Config) -> None:
    """Let every view of another shape be copied if need be."""
    del plan, config
    for node in part.gm.graph.nodes:
        other_type = any(isinstance(a, torch.dtype) for a in (*node.args, *node.kwargs.values()))
        if node.op == "call_method" and node.target in _INSTEAD and not other_type:
            node.target = _INSTEAD[node.target]
