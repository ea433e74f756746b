"""What will be done to a traced graph, decided before anything is built."""

from __future__ import annotations

from torch import fx

from lightning_da3.config import DA3Config
from lightning_da3.errors import ConversionError
from lightning_da3.planning.folds import find_folds
from lightning_da3.planning.head import find_head
from lightning_da3.planning.hosts import find_hosts
from lightning_da3.planning.layers import CONVS, is_spatial, layer_called
from lightning_da3.planning.nodes import INERT_LAYERS, plan_nodes, trained_through
from lightning_da3.planning.plan import HostPlan, NodePlan, Plan
from lightning_da3.tracing import module_of

__all__ = ["INERT_LAYERS", "HostPlan", "NodePlan", "Plan", "layer_called", "plan"]


def plan(gm: fx.GraphModule, config: DA3Config) -> Plan:
    """Decide what becomes of every node.

    Args:
        gm: A traced network, from `lightning_da3.tracing.trace`; only read.
        config: The user's choices.

    Raises:
        ConversionError: There is nothing to adapt, or the head cannot be found.
    """
    network = type(gm).__name__
    if not any(is_spatial(module_of(gm, node)) for node in gm.graph.nodes):
        raise ConversionError(_no_host_message(gm, network, config.adapter.min_stride))
    head = find_head(gm, config.head, network)
    folds = dict(find_folds(gm, head))
    hosts = tuple(find_hosts(gm, config.adapter.min_stride, head, folds))
    if not hosts:
        raise ConversionError(_no_host_message(gm, network, config.adapter.min_stride))
    nodes = tuple(plan_nodes(gm, head, folds, trained_through(gm, hosts)))
    return Plan(network, nodes, hosts, head, _input_channels(gm))


def _input_channels(gm: fx.GraphModule) -> tuple[int, int] | None:
    first = next((node for node in gm.graph.nodes if node.op == "placeholder"), None)
    for user in first.users if first is not None else ():
        conv = module_of(gm, user)
        if isinstance(conv, CONVS):
            return conv.weight.dim() - 2, conv.in_channels
    return None


def _no_host_message(gm: fx.GraphModule, network: str, min_stride: int) -> str:
    spatial = [n.name for n in gm.graph.nodes if is_spatial(module_of(gm, n))]
    if not spatial:
        kinds = sorted({type(m).__name__ for n in gm.graph.nodes if (m := module_of(gm, n))})
        return (
            f"{network} has nothing to adapt: adapters attach to Conv2d layers with a kernel "
            f"larger than 1x1, and its layers are {kinds}."
        )
    return (
        f"{network} has nothing to adapt: its {len(spatial)} spatial convolutions all work on maps "
        f"that are downsampled by less than min_stride={min_stride}. Lower it: "
        "DA3Config(adapter=AdapterConfig(min_stride=1))."
    )
