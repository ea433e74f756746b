"""Which layer is the classifier: the last one with weights on the way to the logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from torch import fx, nn

from lightning_da3.errors import ConversionError
from lightning_da3.layers import ADAPTIVE_POOLS, CONVS, facts_of, operation
from lightning_da3.planning.flow import Flow
from lightning_da3.planning.followed import head_by_running
from lightning_da3.planning.layers import is_pointwise, layer_called
from lightning_da3.tracing.graph_modules import LAYER
from lightning_da3.tracing.graphs import Traced, module_of, output_node


def find_head(
    traced: Traced, head: str | None, examples: Sequence[Any] | None = None
) -> str | None:
    """Module name of the classifier, or None if every domain keeps the network's own.

    Args:
        traced: The network.
        head: ``"auto"``, a module name or None. ``"auto"`` is None where no single layer leads to
            the output, as in detectors, and in networks that end in features.
        examples: The network's arguments, if they are known: what is Python is run on them.

    Raises:
        ConversionError: No such layer is in the network.
    """
    if head is None:
        return None
    if head != "auto":
        candidates = list(_candidates(traced.root))
        if head not in candidates:
            raise ConversionError(
                f"{traced.network} has no Linear or convolution named {head!r} to take as its "
                f"head. It has {candidates[-8:]} (the last ones). DA3Config(head=None) keeps the "
                "network's own head for every domain."
            )
        return head
    if getattr(traced.root, "num_classes", None) == 0:  # as timm's feature extractors say
        return None
    if "" not in traced.python:
        gm = traced.parts[0].gm
        flow = Flow(gm.graph)
        nodes = _outputs(output_node(gm.graph).args[0])
        found = next((n for n in (_walk_to_head(gm, flow, n) for n in nodes) if n), None)
        if found is not None or not traced.python:
            return found
    return head_by_running(traced.root, examples)


def _candidates(root: nn.Module) -> Iterator[str]:
    for name, layer in root.named_modules():
        if isinstance(layer, (nn.Linear, *CONVS)) and name:
            yield name.removesuffix(f".{LAYER}")


_LOGITS = ("logits", "out")


def _outputs(value: Any) -> Iterator[fx.Node]:
    """The values of an output, what is called the logits first: ``{"aux": .., "out": ..}``."""
    if isinstance(value, fx.Node):
        kind = value.target
        made = isinstance(kind, type) and (issubclass(kind, dict) or dataclasses.is_dataclass(kind))
        if made:
            yield from _outputs(dict(value.kwargs) or list(value.args))
        else:
            yield value
    elif isinstance(value, dict):
        for name in sorted(value, key=lambda name: name not in _LOGITS):
            yield from _outputs(value[name])
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _outputs(item)


_REMOVED = ("fc", "head", "heads", "classifier", "last_linear")  # what users make an Identity


def _walk_to_head(gm: fx.GraphModule, flow: Flow, node: fx.Node) -> str | None:
    """Back from an output through whatever has one input, to the first layer with weights.

    None if something else reads what is between, or a norm with statistics is; or if it ends in
    features, as where the classifier is an Identity.
    """
    pooled, active = False, False
    while True:
        if len([user for user in node.users if user not in flow.numbers]) > 1:
            return None
        layer = module_of(gm, node)
        if isinstance(layer, nn.Linear) or (isinstance(layer, CONVS) and layer.groups == 1):
            # squeezenet's scores are relu(conv(x)), pooled
            scores = not active or (pooled and is_pointwise(layer))
            return str(node.target) if scores else None
        if isinstance(layer, nn.Identity) and str(node.target).split(".")[-1] in _REMOVED:
            return None
        tensors = [i for i in node.all_input_nodes if i not in flow.numbers]
        held = layer is not None and any(True for _ in (*layer.parameters(), *layer.buffers()))
        if len(tensors) != 1 or held:
            return None
        pooled = pooled or _pools(gm, node)
        active = active or _activates(gm, node)
        node = tensors[0]


def _pools(gm: fx.GraphModule, node: fx.Node) -> bool:
    return isinstance(layer_called(gm, node), ADAPTIVE_POOLS) or operation(node) == "mean"


_OF_SCORES = (nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Softmax, nn.LogSoftmax, nn.Hardsigmoid)


def _activates(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether it is an activation between layers, and none that makes probabilities of scores."""
    layer = layer_called(gm, node)
    known = facts_of(layer)
    changes = known.elementwise and known.rule is not None and not isinstance(layer, _IDENTITIES)
    return changes and not isinstance(layer, _OF_SCORES)


_IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
