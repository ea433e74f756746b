"""Which layer is the classifier."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from lightning_da3.errors import ConversionError
from lightning_da3.layers import CONVS
from lightning_da3.planning.flow import Flow
from lightning_da3.tracing.graphs import Traced, module_of, output_node


def find_head(traced: Traced, head: str | None) -> str | None:
    """Module name of the classifier, or None if every domain keeps the network's own.

    Args:
        traced: The network.
        head: ``"auto"``, a module name or None. ``"auto"`` is None where no single layer leads to
            the output, as in detectors.

    Raises:
        ConversionError: No such layer is in the network.
    """
    if head is None:
        return None
    candidates = [
        name
        for name, layer in traced.root.named_modules()
        if isinstance(layer, (nn.Linear, *CONVS)) and name
    ]
    if head != "auto":
        if head not in candidates:
            raise ConversionError(
                f"{traced.network} has no Linear or convolution named {head!r} to take as its "
                f"head. It has {candidates[-8:]} (the last ones)."
            )
        return head
    if "" in traced.python:
        return None
    gm = traced.parts[0].gm
    return _walk_to_head(gm, output_node(gm.graph).args[0])


def _walk_to_head(gm: fx.GraphModule, node: Any) -> str | None:
    """Back from the output through whatever has one input, to the first layer with weights.

    If the output has several values, the first counts: ``{"out": .., "aux": ..}``.
    """
    flow = Flow(gm.graph)
    while isinstance(node, (dict, list, tuple)) and node:
        node = next(iter(node.values() if isinstance(node, dict) else node))
    while isinstance(node, fx.Node):
        layer = module_of(gm, node)
        if isinstance(layer, nn.Linear) or (isinstance(layer, CONVS) and layer.groups == 1):
            return str(node.target)
        tensors = [i for i in node.all_input_nodes if i not in flow.numbers]
        if len(tensors) != 1 or (layer is not None and any(True for _ in layer.parameters())):
            return None
        node = tensors[0]
    return None
