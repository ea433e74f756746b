"""What a plan is: frozen values that can be printed, compared and saved."""

from __future__ import annotations

from dataclasses import dataclass


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
