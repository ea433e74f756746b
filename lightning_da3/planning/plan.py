"""What a plan is: frozen values that can be printed, compared and saved."""

from __future__ import annotations

import html
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any


@dataclass(frozen=True)
class HostPlan:
    """One host: the frozen piece between two nodes, and the shape of its adapter.

    Attributes:
        name: The host's name, unique in the network.
        source: The node whose value the adapter reads.
        readers: The host's nodes that read it.
        last: The node whose output the adapter writes.
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: The stride of the whole host, one number an axis; None for tokens, (N, *in, C).
        samples: The axis of the samples: 1 of tokens (T, N, C).
        macs_per_output: Multiply-accumulates for one output position.
        prefix_tokens: Leading class and register tokens, which no cell mixes with others.
        inplace: The output may be overwritten.
        means_from: The node of the convolution that is all of the host, if the backward computes
            the gate's cell means again from what the adapter keeps; None: the means are kept.
        codes_from: The node of the activation whose value the adapter reads, if the adapter keeps
            nothing but the activation's codes where every position is a cell; None: its own codes.
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
    means_from: str | None = None
    samples: int = 0
    codes_from: str | None = None

    @property
    def axes(self) -> int:
        """The axes of the coarse grid. The cells of tokens stand in one row."""
        return 1 if self.stride is None else len(self.stride)


@dataclass(frozen=True)
class BranchPlan:
    """A residual branch that can be skipped as a whole: ``x + f(x)`` becomes ``x``.

    Attributes:
        name: The branch's name, unique in the network.
        total: The node that adds it to what it reads.
        modules: The modules that it calls, as the user's network would say it, in order.
        macs: Its multiply-accumulates for one sample.
        hosts: The names of the hosts in it, which do not act where it is skipped.
        within: The names of the branches that it is a part of.
    """

    name: str
    total: str
    modules: tuple[str, ...]
    macs: float
    hosts: tuple[str, ...] = ()
    within: tuple[str, ...] = ()


@dataclass(frozen=True)
class NodePlan:
    """What becomes of one node.

    Attributes:
        name: The node's name in the traced graph.
        place: The dotted name of the module that does it in the converted network, as the user's
            network would say it.
        layer: What the node calls, for people.
        action: ``"freeze"`` (a convolution), ``"fold"`` (into the convolution before),
            ``"affine"`` (a batch norm that cannot be folded), ``"replace"``, ``"accumulate"``
            (added to its first argument, in place), ``"remove"`` or ``"leave"``.
        keeps: What its backward keeps: ``"nothing"``; ``"bits"`` (one to eight an element, exact);
            ``"codes"`` (8-bit, of the derivative, or of the input, where an adapter reads the value
            and keeps nothing else); ``"recomputed"`` (computed again from what its
            region keeps); ``"kept"`` (whatever PyTorch's own operation keeps); or ``"head"`` (its
            input, for the gradient of the domain's classifier).
        inplace: The node overwrites its input.
        fold_into: The convolution's node, if the action is ``"fold"``.
        stored: The type in which its weight is stored, such as ``"bfloat16"``; "": its own.
    """

    name: str
    place: str
    layer: str
    action: str
    keeps: str = "nothing"
    inplace: bool = False
    fold_into: str | None = None
    stored: str = ""

    @property
    def gone(self) -> bool:
        """Nothing is left of it: the value of its first argument stands for its own."""
        return self.action in ("fold", "remove")


@dataclass(frozen=True)
class RecomputeRegion:
    """Nodes that keep one value for all of them and are computed again in the backward.

    Attributes:
        source: The node whose value is kept.
        nodes: The nodes, in order.
        with_hosts: Hosts lie inside, adapters and all.
        also: Other nodes whose value is kept.
        frozen: Nodes before the first host whose value is kept, too.
        place: The dotted name of the module that computes the region.
        form: ``"graph"`` (operation by operation), or what has a hand-written backward:
            ``"activated convolution"``, ``silu(conv(x))``, or ``"excitation"``,
            ``v * s(mean(v))``.
    """

    source: str
    nodes: tuple[str, ...]
    with_hosts: bool = False
    also: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    place: str = ""
    form: str = "graph"


@dataclass(frozen=True)
class ProloguePlan:
    """Frozen nodes before the first host, which take a large batch in microbatches.

    Attributes:
        source: The node with the samples: an input of the graph.
        nodes: The nodes, in order.
        axes: The number of axes of the samples, (N, ..).
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
        path: The module that became a graph; "" is the whole network.
        nodes: One for every call in the graph, in order.
        hosts: In the order in which data meets them.
        regions: What is computed again.
        prologue: What takes a large batch in microbatches, if anything.
        branches: What can be skipped, in the order in which data meets it.
        macs: Its multiply-accumulates for one sample.
    """

    path: str
    nodes: tuple[NodePlan, ...]
    hosts: tuple[HostPlan, ...]
    regions: tuple[RecomputeRegion, ...] = ()
    prologue: ProloguePlan | None = None
    branches: tuple[BranchPlan, ...] = ()
    macs: float = 0.0

    @property
    def prefix(self) -> str:
        """What stands in front of the names of its nodes and modules in a DA3Model."""
        return f"backbone.{self.path}." if self.path else "backbone."


@dataclass(frozen=True)
class Plan:
    """The whole conversion of one network. Printed, it is a table.

    Attributes:
        network: The name of the network's class.
        parts: One for every graph.
        head: The module name of the classifier that domains replace, or None.
        input_channels: (spatial axes, channels) of the first argument, where a convolution tells.
        python: Modules that could not be traced and stay Python: path and reason.
        functions: Functions of the user that are called as they are: path of the node and reason.
    """

    network: str
    parts: tuple[PartPlan, ...]
    head: str | None
    input_channels: tuple[int, int] | None = None
    python: tuple[tuple[str, str], ...] = ()
    functions: tuple[tuple[str, str], ...] = ()

    @property
    def nodes(self) -> tuple[NodePlan, ...]:
        """The nodes of all graphs."""
        return tuple(node for part in self.parts for node in part.nodes)

    @property
    def hosts(self) -> tuple[HostPlan, ...]:
        """The hosts of all graphs."""
        return tuple(host for part in self.parts for host in part.hosts)

    @property
    def regions(self) -> tuple[RecomputeRegion, ...]:
        """The regions of all graphs."""
        return tuple(region for part in self.parts for region in part.regions)

    @property
    def branches(self) -> tuple[BranchPlan, ...]:
        """The branches of all graphs."""
        return tuple(branch for part in self.parts for branch in part.branches)

    def executed_share(self, skipped: Collection[str]) -> float:
        """The share of the network's FLOPs that run where these branches are skipped.

        Args:
            skipped: Names of branches.
        """
        gone = sum(
            branch.macs
            for branch in self.branches
            if branch.name in skipped and not any(outer in skipped for outer in branch.within)
        )
        return 1.0 - gone / sum(part.macs for part in self.parts) if gone else 1.0

    @property
    def left_to_pytorch(self) -> tuple[str, ...]:
        """Kinds of layers whose backward keeps whatever PyTorch keeps."""
        return tuple(sorted({node.layer for node in self.nodes if node.keeps == "kept"}))

    @property
    def linear_layers(self) -> tuple[str, ...]:
        """The linear layers and convolutions of all graphs, which may be named as a head."""
        kinds = ("Linear", "Conv1d", "Conv2d", "Conv3d")
        return tuple(
            f"{part.path}.{node.place}".lstrip(".").removesuffix(".layer")  # of one layer's graph
            for part in self.parts
            for node in part.nodes
            if node.layer in kinds
        )

    @property
    def headline(self) -> str:
        """What there is to adapt, and what stays Python; for people."""
        return self._summary(most=3)

    def _summary(self, most: int | None) -> str:
        """The headline; where so many are alike, no more of them by name."""
        lines = [f"{self.network}: {len(self.hosts)} hosts, head: {self.head or 'its own'}"]
        prologues = [(_prologue(part), "") for part in self.parts if part.prologue is not None]
        how = ": a large batch in microbatches (on CPU)"
        lines += [f"prologue {names}{how}" for names, _ in _by_reason(prologues, most)]
        if self.branches:
            share = 1 - self.executed_share([branch.name for branch in self.branches])
            count = f"{len(self.branches)} branch{'' if len(self.branches) == 1 else 'es'}"
            lines.append(f"{count} can be skipped, {share:.0%} of the network's FLOPs")
        for what, cases in (("stays Python", self.python), ("called as it is", self.functions)):
            named = [(path or "the network", why) for path, why in cases]
            lines += [f"{what}: {names}, {why}" for names, why in _by_reason(named, most)]
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

    def _repr_html_(self) -> str:
        """The headline, and the table to unfold, for notebooks."""
        table = html.escape("\n".join(self._tables))
        return (
            f"<pre>{html.escape(self.headline)}</pre>"
            f"<details><summary>{len(self.nodes)} nodes</summary><pre>{table}</pre></details>"
        )

    def __str__(self) -> str:
        """A table for people."""
        return "\n".join([self._summary(most=None), *self._tables])

    @property
    def _tables(self) -> list[str]:
        lines: list[str] = []
        for part in self.parts:
            lines += _table(part)
        if self.left_to_pytorch:
            lines.append(f"left to PyTorch (more memory): {', '.join(self.left_to_pytorch)}")
        return lines


def _by_reason(cases: Iterable[tuple[str, str]], most: int | None) -> Iterator[tuple[str, str]]:
    """Names in a row and the reason that they share; only the first of many."""
    reasons: dict[str, list[str]] = {}
    for name, why in cases:
        reasons.setdefault(why, []).append(name)
    for why, names in reasons.items():
        more = 0 if most is None or len(names) <= most + 1 else len(names) - most
        yield ", ".join(names[: len(names) - more]) + (f" and {more} more" if more else ""), why


def _prologue(part: PartPlan) -> str:
    """Where its prologue begins and ends."""
    assert part.prologue is not None
    places = {node.name: node.place for node in part.nodes}
    ends = " to ".join(dict.fromkeys(places[part.prologue.nodes[i]] for i in (0, -1)))
    if not part.path:
        return ends
    return part.path if ends == "layer" else f"{part.path}: {ends}"


def _table(part: PartPlan) -> list[str]:
    places = {node.name: node.place for node in part.nodes}
    marks: dict[str, list[str]] = {}
    for host in part.hosts:
        codes = host.codes_from and f" from the codes of {places.get(host.codes_from)}"
        marks.setdefault(host.readers[0], []).append(f"reads {host.name}{codes or ''}")
        again = "" if host.means_from is None else ", means computed again"
        marks.setdefault(host.last, []).append(f"writes {host.name}{again}")
    for i, region in enumerate(part.regions):
        sources = ", ".join(places.get(name, name) for name in (region.source, *region.also))
        form = "" if region.form == "graph" else f" as {region.form}"
        for name in region.nodes:
            marks.setdefault(name, []).append(f"again from {sources}{form} ({i})")
    width = max((len(node.place) for node in part.nodes), default=4)
    lines = [f"{part.path}:"] if part.path else []
    lines.append(f"{'name':<{width}}  {'layer':<20} {'action':<11} {'keeps':<10} host")
    for node in part.nodes:
        action = f"{node.action}{'_' if node.inplace else ''}"
        notes = [f"stored in {node.stored}"] if node.stored else []
        notes += marks.get(node.name, [])
        lines.append(
            f"{node.place:<{width}}  {node.layer:<20} {action:<11} {node.keeps:<10} "
            f"{', '.join(notes)}".rstrip()
        )
    return lines
