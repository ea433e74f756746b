"""``linear(x)`` and ``attention(x, x, x)`` become the same with weights that rest in bfloat16."""

from __future__ import annotations

from collections import Counter
from operator import attrgetter

import torch
from torch import fx, nn

from lightning_da3.layers import has_hooks
from lightning_da3.nn.linear import attends_plainly, store_weights_
from lightning_da3.tracing.graphs import Part, module_of


def store_weights_in_bfloat16_(part: Part, head: str | None) -> None:
    """Let the weights of linear layers and self-attention rest; convolutions' do by themselves.

    Layers whose tensors others use as well, or whose hooks someone waits for, stay as they are.

    Args:
        part: A traced graph; edited in place.
        head: The user's name of the classifier, which stays as it is.
    """
    calls: dict[str, list[fx.Node]] = {}
    for node in part.gm.graph.nodes:
        if node.op == "call_module" and part.user_name(str(node.target)) != head:
            calls.setdefault(str(node.target), []).append(node)
    owners = Counter(id(p) for _, p in part.gm.named_parameters(remove_duplicate=False))
    reads = [str(node.target) for node in part.gm.graph.nodes if node.op == "get_attr"]
    owners.update(id(attrgetter(name)(part.gm)) for name in reads)
    for nodes in calls.values():
        layer = module_of(part.gm, nodes[0])
        if layer is None or has_hooks(layer) or any(owners[id(p)] > 1 for p in layer.parameters()):
            continue
        alone = attends_plainly(layer) and all(map(_attends_to_itself, nodes))
        if type(layer) is nn.Linear or (type(layer) is nn.MultiheadAttention and alone):
            store_weights_(layer, torch.bfloat16)


def _attends_to_itself(node: fx.Node) -> bool:
    """Whether nobody wants the attention weights, and there are no masks."""
    choices = dict(node.kwargs)
    choices.pop("average_attn_weights", None)
    wanted = choices.pop("need_weights", True) or any(choices.values())
    return len(node.args) == 3 and len({*node.args}) == 1 and not wanted
