"""Which layer is the classifier."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from lightning_da3.errors import ConversionError
from lightning_da3.planning.layers import CONVS
from lightning_da3.tracing import module_of, output_node


def find_head(gm: fx.GraphModule, head: str | None, network: str) -> str | None:
    """Module name of the classifier, or None if every domain keeps the network's own.

    Args:
        gm: A traced network.
        head: ``"auto"``, a module name or None.
        network: Name of the network's class, for errors.

    Raises:
        ConversionError: It is not there, or cannot be found.
    """
    if head is None:
        return None
    candidates = [
        str(node.target)
        for node in gm.graph.nodes
        if isinstance(module_of(gm, node), (nn.Linear, *CONVS))
    ]
    if head != "auto":
        if head not in candidates:
            raise ConversionError(
                f"{network} has no Linear or convolution named {head!r} to take as its head. "
                f"It has {candidates[-8:]} (the last ones)."
            )
        return head
    found = _walk_to_head(gm, output_node(gm.graph).args[0])
    if found is None:
        raise ConversionError(
            f"The classifier of {network} cannot be found: no single Linear or convolution leads "
            f"to its output. Name it, DA3Config(head={candidates[-1] if candidates else 'name'!r}) "
            "say, or keep the network's own head for every domain with DA3Config(head=None)."
        )
    return found


def _walk_to_head(gm: fx.GraphModule, node: Any) -> str | None:
    """Back from the output through whatever has one input, to the first layer with weights."""
    while isinstance(node, fx.Node):
        layer = module_of(gm, node)
        if isinstance(layer, nn.Linear) or (isinstance(layer, CONVS) and layer.groups == 1):
            return str(node.target)
        inputs = node.all_input_nodes
        if len(inputs) != 1 or (layer is not None and any(True for _ in layer.parameters())):
            return None
        node = inputs[0]
    return None
