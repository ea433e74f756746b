"""Which layer is the classifier."""

from __future__ import annotations

from collections.abc import Iterator
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
    flow = Flow(gm.graph)
    found = (_walk_to_head(gm, flow, node) for node in _outputs(output_node(gm.graph).args[0]))
    return next((name for name in found if name is not None), None)


_LOGITS = ("logits", "out")


def _outputs(value: Any) -> Iterator[fx.Node]:
    """The values of an output, what is called the logits first: ``{"aux": .., "out": ..}``."""
    if isinstance(value, fx.Node):
        yield value
    elif isinstance(value, dict):
        for name in sorted(value, key=lambda name: name not in _LOGITS):
            yield from _outputs(value[name])
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _outputs(item)


def _walk_to_head(gm: fx.GraphModule, flow: Flow, node: fx.Node) -> str | None:
    """Back from an output through whatever has one input, to the first layer with weights.

    None if something else reads what is between, or a norm with statistics is.
    """
    while True:
        if len([user for user in node.users if user not in flow.numbers]) > 1:
            return None
        layer = module_of(gm, node)
        if isinstance(layer, nn.Linear) or (isinstance(layer, CONVS) and layer.groups == 1):
            return str(node.target)
        tensors = [i for i in node.all_input_nodes if i not in flow.numbers]
        held = layer is not None and any(True for _ in (*layer.parameters(), *layer.buffers()))
        if len(tensors) != 1 or held:
            return None
        node = tensors[0]
