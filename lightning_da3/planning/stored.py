"""Which layers' weights are stored in bfloat16."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from operator import attrgetter

from torch import fx, nn

from lightning_da3.layers import TRANSPOSED, has_hooks
from lightning_da3.nn.linear import attends_plainly
from lightning_da3.planning.plan import NodePlan
from lightning_da3.tracing.graphs import module_of


def find_stored(gm: fx.GraphModule, nodes: tuple[NodePlan, ...]) -> Iterator[str]:
    """Names of the nodes that call convolutions, linear layers and self-attention that may be.

    Layers whose tensors others use as well, whose hooks someone waits for, and the head, stay as
    they are.

    Args:
        gm: A traced graph.
        nodes: What becomes of every node.
    """
    plan = {node.name: node for node in nodes}
    calls: dict[str, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    owners = Counter(id(p) for _, p in gm.named_parameters(remove_duplicate=False))
    reads = [str(node.target) for node in gm.graph.nodes if node.op == "get_attr"]
    owners.update(id(attrgetter(name)(gm)) for name in reads)
    for called in calls.values():
        layer, step = module_of(gm, called[0]), plan[called[0].name]
        if step.action == "freeze" or isinstance(layer, TRANSPOSED):
            yield from (node.name for node in called)  # their weights are copied
            continue
        shared = layer is None or any(owners[id(p)] > 1 for p in layer.parameters())
        if layer is None or shared or has_hooks(layer) or step.keeps == "head":
            continue
        alone = attends_plainly(layer) and all(map(_attends_to_itself, called))
        if type(layer) is nn.Linear or (type(layer) is nn.MultiheadAttention and alone):
            yield from (node.name for node in called)


def _attends_to_itself(node: fx.Node) -> bool:
    """Whether nobody wants the attention weights, and there are no masks."""
    choices = dict(node.kwargs)
    choices.pop("average_attn_weights", None)
    wanted = choices.pop("need_weights", True) or any(choices.values())
    return len(node.args) == 3 and len({*node.args}) == 1 and not wanted
