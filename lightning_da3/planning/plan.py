"""What a plan is: frozen values that can be printed, compared and saved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any


@dataclass(frozen=True)
class HostPlan:
    """One host: the frozen piece between two nodes, and the shape of its adapter.

    Attributes:
        name: Of the host, unique in the network.
        source: Name of the node whose value the adapter reads.
        readers: Names of the host's nodes that read it.
        last: Name of the node whose output the adapter writes.
        in_channels: Of the input.
        out_channels: Of the output.
        stride: Of the whole host, one number an axis; None for tokens, (N, *in, C).
        macs_per_output: Multiply-accumulates for one output position.
        prefix_tokens: Leading class and register tokens, which no cell mixes with others.
        inplace: Its output may be overwritten.
    """

    name: str
    source: str
    readers: tuple[str, ...]
    last: str
    in_channels: int
    out_channels: int
    stride: tuple[int, ...] | None
    macs_per_output: float
    prefix_tokens: int = 0
    inplace: bool = True

    @property
    def axes(self) -> int:
        """Of the coarse grid: tokens' cells stand in one row."""
        return 1 if self.stride is None else len(self.stride)


@dataclass(frozen=True)
class NodePlan:
    """What becomes of one node.

    Attributes:
        name: Of the node.
        layer: What it calls, for people.
        action: ``"freeze"``, ``"fold"`` (into the convolution before), ``"affine"``, ``"replace"``,
            ``"fuse"`` (replaced, in one operation with the convolution before), ``"accumulate"``
            (added to its first argument, in place), ``"remove"`` or ``"leave"``.
        keeps: What its backward keeps: ``"nothing"``; ``"bits"`` (one to eight an element, exact);
            ``"codes"`` (8-bit, of the derivative); ``"recomputed"`` (from what its region keeps);
            ``"kept"`` (whatever PyTorch's own operation keeps); or ``"head"`` (its input, for
            the gradient of the domain's classifier).
        inplace: It overwrites its input.
        fold_into: The convolution's node, if the action is ``"fold"`` or ``"fuse"``.
    """

    name: str
    layer: str
    action: str
    keeps: str = "nothing"
    inplace: bool = False
    fold_into: str | None = None


@dataclass(frozen=True)
class RecomputeRegion:
    """Frozen nodes that keep one value for all of them and are computed again in the backward.

    Attributes:
        source: Name of the node whose value is kept.
        nodes: Names of the nodes, in order.
        with_hosts: Hosts lie inside, adapters and all.
        also: Names of other nodes whose value is kept: what an island reads may be several.
    """

    source: str
    nodes: tuple[str, ...]
    with_hosts: bool = False
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class ProloguePlan:
    """Frozen nodes before the first host, which take a large batch in pieces.

    Attributes:
        source: Name of the node with the samples: an input of the graph.
        nodes: Names of the nodes, in order.
        axes: Of the samples, (N, ..).
        growth: Elements of the largest value for every element of the samples.
    """

    source: str
    nodes: tuple[str, ...]
    axes: int
    growth: float


@dataclass(frozen=True)
class PartPlan:
    """The plan of one graph.

    Attributes:
        path: Of the module that became a graph; "" is the whole network.
        nodes: One for every call in the graph, in order.
        hosts: In the order in which data meets them.
        regions: What is computed again.
        start: What takes a large batch in pieces, if anything.
    """

    path: str
    nodes: tuple[NodePlan, ...]
    hosts: tuple[HostPlan, ...]
    regions: tuple[RecomputeRegion, ...] = ()
    start: ProloguePlan | None = None

    @property
    def prefix(self) -> str:
        """Of the names of its nodes and modules in a DA3Model."""
        return f"backbone.{self.path}." if self.path else "backbone."


@dataclass(frozen=True)
class Plan:
    """The whole conversion of one network.

    Attributes:
        network: Name of the network's class.
        parts: One for every graph.
        head: Module name of the classifier that domains replace, or None.
        input_channels: (spatial axes, channels) of the first argument, where a convolution tells.
        python: Modules that could not be traced and stay Python: path and reason.
    """

    network: str
    parts: tuple[PartPlan, ...]
    head: str | None
    input_channels: tuple[int, int] | None = None
    python: tuple[tuple[str, str], ...] = ()

    @property
    def nodes(self) -> tuple[NodePlan, ...]:
        """Of all graphs."""
        return tuple(node for part in self.parts for node in part.nodes)

    @property
    def hosts(self) -> tuple[HostPlan, ...]:
        """Of all graphs."""
        return tuple(host for part in self.parts for host in part.hosts)

    @property
    def regions(self) -> tuple[RecomputeRegion, ...]:
        """Of all graphs."""
        return tuple(region for part in self.parts for region in part.regions)

    @property
    def left_to_pytorch(self) -> tuple[str, ...]:
        """Kinds of layers whose backward keeps whatever PyTorch keeps."""
        return tuple(sorted({node.layer for node in self.nodes if node.keeps == "kept"}))

    @property
    def headline(self) -> str:
        """What there is to adapt, and what stays Python; for people."""
        lines = [f"{self.network}: {len(self.hosts)} hosts, head: {self.head or 'its own'}"]
        for part in self.parts:
            if part.start is not None:
                where = f"{part.path}: " if part.path else ""
                ends = " to ".join(dict.fromkeys((part.start.nodes[0], part.start.nodes[-1])))
                lines.append(f"{where}{ends}: a large batch in pieces (on CPU)")
        lines += [f"stays Python: {path or 'the network'}, {why}" for path, why in self.python]
        return "\n".join(lines)

    if not TYPE_CHECKING:  # or type checkers would take every misspelt name

        def __getattr__(self, name: str) -> Any:
            """Say where `at` went."""
            if name == "at":
                raise AttributeError(
                    "A plan is a plain value and has no `at` any more. What a step costs says "
                    "`lightning_da3.step_costs(model, batch_size, image_size)`."
                )
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __str__(self) -> str:
        """A table for people."""
        lines = [self.headline]
        for part in self.parts:
            lines += _table(part)
        if self.left_to_pytorch:
            lines.append(f"left to PyTorch (more memory): {', '.join(self.left_to_pytorch)}")
        return "\n".join(lines)


def _table(part: PartPlan) -> list[str]:
    marks: dict[str, list[str]] = {}
    for host in part.hosts:
        marks.setdefault(host.readers[0], []).append(f"reads {host.name}")
        marks.setdefault(host.last, []).append(f"writes {host.name}")
    for i, region in enumerate(part.regions):
        for name in region.nodes:
            sources = ", ".join((region.source, *region.also))
            marks.setdefault(name, []).append(f"again from {sources} ({i})")
    width = max((len(node.name) for node in part.nodes), default=4)
    lines = [f"{part.path}:"] if part.path else []
    lines.append(f"{'node':<{width}}  {'layer':<20} {'action':<8} {'keeps':<8} host")
    for node in part.nodes:
        action = f"{node.action}{'_' if node.inplace else ''}"
        lines.append(
            f"{node.name:<{width}}  {node.layer:<20} {action:<8} {node.keeps:<8} "
            f"{', '.join(marks.get(node.name, []))}".rstrip()
        )
    return lines
