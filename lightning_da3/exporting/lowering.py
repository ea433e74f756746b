"""From a recorded graph to one whose operations every runtime has."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_da3.ops.exportable_codes import code_parts, from_parts
from lightning_da3.torch_private.decompositions import VIEWS

_aten = torch.ops.aten
TURNED = "_turned"
"""What the name of a kernel that is turned around ends with, after that of the kernel."""

_ENCODE = torch.ops.lightning_da3.encode_rows.default
_DECODE = torch.ops.lightning_da3.decode_rows.default


class Lowered(nn.Module):
    """A recorded graph, run node by node, in which codes are three tensors.

    Args:
        gm: The graph; frozen tensors are its buffers.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__()
        _fold_flips_(gm)
        self.gm = gm

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """What the graph computes."""
        return tuple(_Parts(self.gm).run(*tensors))


class _Parts(fx.Interpreter):
    """Runs a graph in which codes are in three parts.

    ::

        decode_rows(encode_rows(x))   becomes   from_parts(*code_parts(x))
    """

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is _ENCODE:
            return code_parts(*args)
        if target is _DECODE:
            return from_parts(*args[0])
        if target in VIEWS:  # other strides may lie behind it when another batch runs
            return args[0].reshape(args[1])
        if args and isinstance(args[0], tuple) and target is not operator.getitem:
            return args[0]  # codes that were detached, or only named again
        return super().call_function(target, args, kwargs)


def _fold_flips_(gm: fx.GraphModule) -> None:
    """Let kernels that are turned around be turned once: runtimes do not turn constants."""
    for node in list(gm.graph.nodes):
        if node.target is not _aten.flip.default or node.args[0].op != "get_attr":
            continue
        turned = gm.get_buffer(node.args[0].target).flip(node.args[1])
        name = f"{node.args[0].target}{TURNED}"
        gm.register_buffer(name, turned)
        with gm.graph.inserting_before(node):
            get = gm.graph.get_attr(name)
        node.replace_all_uses_with(get)
        gm.graph.erase_node(node)
    gm.recompile()
