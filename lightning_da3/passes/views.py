"""``x.view(..)`` becomes ``x.reshape(..)``: frozen convolutions give channels_last maps.

Of these not every view exists that a contiguous map has.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lightning_da3.config import DA3Config
from lightning_da3.planning import PartPlan
from lightning_da3.tracing import Part, module_of

_IN_PLACE = ("iadd", "isub", "imul", "itruediv", "setitem")
_VIEWS = ("view", "reshape", "getitem", "transpose", "permute", "flatten", "unsqueeze", "squeeze")

_INSTEAD = {"view": "reshape", "view_as": "reshape_as"}


def reshape_(part: Part, plan: PartPlan, config: DA3Config) -> None:
    """Let every view of another shape be copied if need be, unless something writes through it."""
    del plan, config
    for node in part.gm.graph.nodes:
        if node.op != "call_method" or node.target not in _INSTEAD:
            continue
        if any(map(_is_type, (*node.args, *node.kwargs.values()))) or _is_written(part.gm, node):
            continue
        node.target = _INSTEAD[node.target]
        node.kwargs = {"shape" if k == "size" else k: v for k, v in node.kwargs.items()}


def _is_type(value: Any) -> bool:
    asked = isinstance(value, fx.Node) and value.target is getattr and value.args[1] == "dtype"
    return bool(asked) or isinstance(value, torch.dtype)


def _is_written(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether what reads the value, by itself or through a view of it, writes into it."""
    for user in node.users:
        name = str(getattr(user.target, "__name__", user.target))
        first = bool(user.args) and user.args[0] is node
        inplace = user.kwargs.get("inplace") or getattr(module_of(gm, user), "inplace", False)
        writes = (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE or inplace
        if first and (writes or (name in _VIEWS and _is_written(gm, user))):
            return True
    return False
