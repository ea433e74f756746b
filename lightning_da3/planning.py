"""What will be done to a traced graph, decided before anything is built: frozen, printable values.

Where hosts are: every spatial convolution; a depthwise one together with its pointwise neighbours,
because it mixes no channels and the narrow ends of such a block are what is cheap to read.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from lightning_da3.config import DA3Config
from lightning_da3.errors import ConversionError
from lightning_da3.nn.frozen import numbers
from lightning_da3.registry import Replacement, layer_of, replacement_for
from lightning_da3.tracing import module_of, output_node

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class HostPlan:
    """One host: the frozen piece between two nodes, and the shape of its adapter.

    Attributes:
        name: Of the host, unique in the network.
        first: Name of the node whose input the adapter reads.
        last: Name of the node whose output the adapter writes.
        in_channels: Of the input.
        out_channels: Of the output.
        stride: Of the whole host, one number an axis.
        macs_per_output: Multiply-accumulates for one output position.
    """

    name: str
    first: str
    last: str
    in_channels: int
    out_channels: int
    stride: tuple[int, ...]
    macs_per_output: float


@dataclass(frozen=True)
class NodePlan:
    """What becomes of one node.

    Attributes:
        name: Of the node.
        layer: What it calls, for people.
        action: ``"freeze"``, ``"fold"`` (into the convolution before), ``"affine"``, ``"replace"``,
            ``"remove"`` or ``"leave"``.
        keeps: What its backward keeps: ``"nothing"``, ``"bits"``, ``"bytes"`` or ``"pytorch"``
            (whatever PyTorch's own operation keeps).
        inplace: It overwrites its input.
        fold_into: The convolution's node, if the action is ``"fold"``.
    """

    name: str
    layer: str
    action: str
    keeps: str = "nothing"
    inplace: bool = False
    fold_into: str | None = None


@dataclass(frozen=True)
class Plan:
    """The whole conversion of one network.

    Attributes:
        network: Name of the network's class.
        nodes: One for every call in the graph, in order.
        hosts: In the order in which data meets them.
        head: Module name of the classifier that domains replace, or None.
        input_channels: (spatial axes, channels) of the first argument, where a convolution tells.
    """

    network: str
    nodes: tuple[NodePlan, ...]
    hosts: tuple[HostPlan, ...]
    head: str | None
    input_channels: tuple[int, int] | None = None

    @property
    def left_to_pytorch(self) -> tuple[str, ...]:
        """Kinds of layers whose backward keeps whatever PyTorch keeps."""
        return tuple(sorted({node.layer for node in self.nodes if node.keeps == "pytorch"}))

    def __str__(self) -> str:
        """A table for people."""
        first = {host.first: host.name for host in self.hosts}
        last = {host.last: host.name for host in self.hosts}
        width = max((len(node.name) for node in self.nodes), default=4)
        lines = [
            f"{self.network}: {len(self.hosts)} hosts, head: {self.head or 'the backbone own'}",
            f"{'node':<{width}}  {'layer':<20} {'action':<8} {'keeps':<8} host",
        ]
        for node in self.nodes:
            marks = [f"reads {first[node.name]}"] if node.name in first else []
            marks += [f"writes {last[node.name]}"] if node.name in last else []
            action = f"{node.action}{'_' if node.inplace else ''}"
            lines.append(
                f"{node.name:<{width}}  {node.layer:<20} {action:<8} {node.keeps:<8} "
                f"{', '.join(marks)}".rstrip()
            )
        if self.left_to_pytorch:
            lines.append(f"left to PyTorch (more memory): {', '.join(self.left_to_pytorch)}")
        return "\n".join(lines)


def plan(gm: fx.GraphModule, config: DA3Config) -> Plan:
    """Decide what becomes of every node.

    Args:
        gm: A traced network, from `lightning_da3.tracing.trace`; only read.
        config: The user's choices.

    Raises:
        ConversionError: There is nothing to adapt, or the head cannot be found.
    """
    network = type(gm).__name__
    if not any(_is_spatial(module_of(gm, node)) for node in gm.graph.nodes):
        raise ConversionError(_no_host_message(gm, network, config.adapter.min_stride))
    head = _find_head(gm, config.head, network)
    folds = dict(_find_folds(gm, head))
    hosts = tuple(_find_hosts(gm, config.adapter.min_stride, head, folds))
    if not hosts:
        raise ConversionError(_no_host_message(gm, network, config.adapter.min_stride))
    nodes = tuple(_plan_nodes(gm, head, folds, _trained_through(gm, hosts)))
    return Plan(network, nodes, hosts, head, _input_channels(gm))


def _input_channels(gm: fx.GraphModule) -> tuple[int, int] | None:
    first = next((node for node in gm.graph.nodes if node.op == "placeholder"), None)
    for user in first.users if first is not None else ():
        conv = module_of(gm, user)
        if isinstance(conv, CONVS):
            return conv.weight.dim() - 2, conv.in_channels
    return None


def _no_host_message(gm: fx.GraphModule, network: str, min_stride: int) -> str:
    spatial = [n.name for n in gm.graph.nodes if _is_spatial(module_of(gm, n))]
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


def _trained_through(gm: fx.GraphModule, hosts: tuple[HostPlan, ...]) -> set[str]:
    """Nodes that something trainable is upstream of; the others build no graph, keep nothing."""
    last = {host.last for host in hosts}
    trained: set[str] = set()
    for node in gm.graph.nodes:
        if any(i.name in trained or i.name in last for i in node.all_input_nodes):
            trained.add(node.name)
    return trained


# --- the classifier -------------------------------------------------------------------------------


def _find_head(gm: fx.GraphModule, head: str | None, network: str) -> str | None:
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


# --- batch norm into convolutions -----------------------------------------------------------------


def _calls(gm: fx.GraphModule) -> Counter[int]:
    return Counter(id(m) for n in gm.graph.nodes if (m := module_of(gm, n)) is not None)


def _find_folds(gm: fx.GraphModule, head: str | None) -> Iterator[tuple[str, str]]:
    """(batch norm node, convolution node): ``bn(conv(x))`` where nobody else reads conv(x)."""
    calls = _calls(gm)
    for node in gm.graph.nodes:
        norm = module_of(gm, node)
        if not _has_statistics(norm):
            continue
        before = node.args[0]
        conv = module_of(gm, before) if isinstance(before, fx.Node) else None
        if (
            type(conv) in CONVS
            and len(before.users) == 1
            and calls[id(conv)] == 1
            and calls[id(norm)] == 1
            and str(before.target) != head
        ):
            yield node.name, before.name


def _has_statistics(layer: nn.Module | None) -> bool:
    return type(layer) in BATCH_NORMS and layer.running_mean is not None  # type: ignore[union-attr]


# --- hosts ----------------------------------------------------------------------------------------


def _is_spatial(layer: nn.Module | None) -> bool:
    return type(layer) is nn.Conv2d and math.prod(layer.kernel_size) > 1


def _is_pointwise(layer: nn.Module | None) -> bool:
    return type(layer) is nn.Conv2d and math.prod(layer.kernel_size) == 1 and layer.groups == 1


def _is_depthwise(layer: nn.Module | None) -> bool:
    return type(layer) is nn.Conv2d and 1 < layer.groups == layer.in_channels


def _find_hosts(
    gm: fx.GraphModule, min_stride: int, head: str | None, folds: dict[str, str]
) -> Iterator[HostPlan]:
    reduction = _reductions(gm)
    names: Counter[str] = Counter()
    norm_of = {conv: norm for norm, conv in folds.items()}
    for node in gm.graph.nodes:
        conv = module_of(gm, node)
        if not _is_spatial(conv) or str(node.target) == head:
            continue
        if reduction[node] < min_stride:
            continue
        first = last = node
        if _is_depthwise(conv):
            first = _neighbour(gm, node, head, backwards=True) or node
            last = _neighbour(gm, node, head, backwards=False) or node
        names[str(node.target)] += 1
        count = names[str(node.target)]
        yield _host(
            gm,
            name=str(node.target) + (f":{count}" if count > 1 else ""),  # a layer called again
            chain=_chain(first, last),
            last=norm_of.get(last.name, last.name),
        )


def _host(gm: fx.GraphModule, name: str, chain: list[fx.Node], last: str) -> HostPlan:
    convs = [layer for node in chain if type(layer := module_of(gm, node)) is nn.Conv2d]
    macs, area = 0.0, 1
    for conv in reversed(convs):  # earlier ones work on larger maps
        macs += conv.weight.numel() * area
        area *= math.prod(conv.stride)
    stride = tuple(math.prod(axis) for axis in zip(*(c.stride for c in convs), strict=True))
    return HostPlan(
        name, chain[0].name, last, convs[0].in_channels, convs[-1].out_channels, stride, macs
    )


def _neighbour(
    gm: fx.GraphModule, node: fx.Node, head: str | None, *, backwards: bool
) -> fx.Node | None:
    """The pointwise convolution next to `node`, past batch norms and activations only."""
    while True:
        if backwards:
            step = node.args[0] if node.args else None
        else:
            step = next(iter(node.users)) if len(node.users) == 1 else None
        if not isinstance(step, fx.Node) or (backwards and len(step.users) != 1):
            return None
        layer = _layer(gm, step)
        if _is_pointwise(layer):
            return None if str(step.target) == head else step
        replacement = replacement_for(layer) if layer is not None else None
        elementwise = _has_statistics(layer) or (
            replacement is not None and (replacement.keeps == "bits" or replacement.build is None)
        )
        if not elementwise:
            return None
        node = step


def _chain(first: fx.Node, last: fx.Node) -> list[fx.Node]:
    chain = [last]
    while chain[-1] is not first:
        before = chain[-1].args[0]
        assert isinstance(before, fx.Node)
        chain.append(before)
    return chain[::-1]


def _reductions(gm: fx.GraphModule) -> dict[fx.Node, int]:
    """By how much every node's output is smaller than the network's input, along an axis."""
    reduction: dict[fx.Node, int] = {}
    for node in gm.graph.nodes:
        before = max((reduction[i] for i in node.all_input_nodes), default=1)
        layer = _layer(gm, node)
        stride = getattr(layer, "stride", 1) if layer is not None else 1
        reduction[node] = before * max(numbers(stride, 1)) if stride else before
    return reduction


# --- every node -----------------------------------------------------------------------------------


def _layer(gm: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The layer that `node` calls, or that does what its function or method does."""
    if node.op in ("call_function", "call_method") and node.args:
        return layer_of(node.target, node.args[1:], dict(node.kwargs))
    return module_of(gm, node)


def _plan_nodes(
    gm: fx.GraphModule,
    head: str | None,
    folds: dict[str, str],
    trained: set[str],
) -> Iterator[NodePlan]:
    fresh: set[str] = set()  # nodes whose result is new memory that nothing else refers to
    for node in gm.graph.nodes:
        if not node.op.startswith("call"):
            continue
        planned = _plan_node(gm, node, head, folds, fresh)
        if planned.action in ("freeze", "affine", "replace", "fold") or _is_fresh(node, fresh):
            fresh.add(node.name)
        if node.name not in trained:
            planned = dataclasses.replace(planned, keeps="nothing")
        yield planned


_NEW_MEMORY = {torch.cat, torch.add, torch.sub, torch.mul}


def _is_fresh(node: fx.Node, fresh: set[str]) -> bool:
    name = getattr(node.target, "__name__", "")
    if name in ("iadd", "isub", "imul"):
        before = node.args[0]
        return isinstance(before, fx.Node) and before.name in fresh and len(before.users) == 1
    return node.target in _NEW_MEMORY or name in ("add", "sub", "mul")


def _plan_node(
    gm: fx.GraphModule,
    node: fx.Node,
    head: str | None,
    folds: dict[str, str],
    fresh: set[str],
) -> NodePlan:
    called = module_of(gm, node)
    layer = _layer(gm, node)
    label = _label(node, called)
    before = node.args[0] if node.args else None
    free = isinstance(before, fx.Node) and before.name in fresh and len(before.users) == 1
    if node.op == "call_module" and str(node.target) == head:
        return NodePlan(node.name, label, "leave", "head")
    if type(called) in CONVS:
        return NodePlan(node.name, label, "freeze")
    if node.name in folds:
        return NodePlan(node.name, label, "fold", fold_into=folds[node.name])
    if _has_statistics(called):
        return NodePlan(node.name, label, "affine", inplace=free)
    replacement = replacement_for(layer) if layer is not None else None
    if replacement is None:
        keeps = "nothing" if _keeps_nothing(node, called) else "pytorch"
        return NodePlan(node.name, label, "leave", keeps)
    if replacement.build is None:
        return NodePlan(node.name, label, "remove")
    inplace = _overwrites(replacement, free)
    return NodePlan(node.name, label, "replace", replacement.keeps, inplace)


def _overwrites(replacement: Replacement, free: bool) -> bool:
    """In place where the user asked for it, or where nobody could tell."""
    return replacement.inplace is not None and (replacement.inplace or free)


def _label(node: fx.Node, called: nn.Module | None) -> str:
    if called is not None:
        return type(called).__name__
    return str(getattr(node.target, "__name__", node.target))


# frozen, they keep nothing, and they compute the same in train mode as in eval
INERT_LAYERS = (nn.Linear, nn.Flatten, nn.Unflatten, nn.ZeroPad2d, nn.ConstantPad2d)
_KEEP_NOTHING_NAMES = frozenset(
    "add iadd sub isub radd cat stack chunk split unbind flatten view reshape permute transpose "
    "contiguous size getattr getitem unsqueeze squeeze expand mean sum to dim numel float half "
    "pad movedim swapaxes t neg floordiv eq ne lt le gt ge _assert".split()
)


def _keeps_nothing(node: fx.Node, called: nn.Module | None) -> bool:
    if called is not None:
        return type(called) in INERT_LAYERS
    return _label(node, None) in _KEEP_NOTHING_NAMES


def layer_at(gm: fx.GraphModule, node: fx.Node) -> nn.Module:
    """The layer of a node that the plan replaces.

    Args:
        gm: The traced network.
        node: Planned as ``"replace"``.
    """
    layer = _layer(gm, node)
    assert layer is not None
    return layer
