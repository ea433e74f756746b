"""``x.view(..)`` becomes ``x.reshape(..)``: frozen convolutions give channels_last maps.

Such maps do not have every view that contiguous ones have.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lightning_da3.config import DA3Config
from lightning_da3.layers import copying_name
from lightning_da3.planning.plan import PartPlan
from lightning_da3.tracing.graphs import Part


def reshape_(part: Part, plan: PartPlan, config: DA3Config) -> None:
    """Let every view of another shape be copied if need be.

    What writes through a view of a value that is read again stays Python (see tracing).
    """
    del plan, config
    for node in part.gm.graph.nodes:
        to_type = any(map(_is_type, (*node.args, *node.kwargs.values())))
        copying = copying_name(str(node.target)) if node.op == "call_method" else ""
        if copying and not to_type:
            node.target = copying
            node.kwargs = {"shape" if k == "size" else k: v for k, v in node.kwargs.items()}


def _is_type(value: Any) -> bool:
    asked = isinstance(value, fx.Node) and value.target is getattr and value.args[1] == "dtype"
    return bool(asked) or isinstance(value, torch.dtype)
