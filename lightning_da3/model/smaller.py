"""The network without some of its residual branches, for domains that skip them.

It is traced, planned and rewritten like the whole one, from the copy of the network without values;
what it computes with are the tensors of the rewritten network itself.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, fx, nn

from lightning_da3.config import DA3Config
from lightning_da3.errors import DA3Error
from lightning_da3.memory import fake_mode_of
from lightning_da3.model.binding import Bound, without_values_of
from lightning_da3.model.original import Original
from lightning_da3.nn.call import Calls
from lightning_da3.passes.branches import (
    check_not_computed,
    found_again,
    remove_dead_,
    skip_,
    without_branches,
)
from lightning_da3.passes.rewriting import rewrite
from lightning_da3.planning.plan import Plan
from lightning_da3.planning.planner import make_plan
from lightning_da3.torch_private.trees import tree_map_only
from lightning_da3.tracing.autocast import in_precision
from lightning_da3.tracing.graphs import Traced
from lightning_da3.tracing.islands import trace


class Smaller(Bound):
    """The whole network without some branches. It is called as the network is.

    Args:
        skipped: Names of branches.
        original: Of the model.
        backbone: The rewritten network, whose tensors are used.
        plan: Its plan.
        config: The user's choices.
        calls: What it computes with.

    Raises:
        DA3Error: The model does not know its network any more.
    """

    def __init__(
        self,
        skipped: Collection[str],
        original: Original,
        backbone: nn.Module,
        plan: Plan,
        config: DA3Config,
        calls: Calls,
    ) -> None:
        with _traced_again(original, backbone, plan) as (traced, inputs):
            traced, hosts = without_branches(traced, plan, skipped)
            known = dataclasses.replace(config, head=plan.head)
            decided = make_plan(traced, known, inputs, hosts_of=hosts)
            root = rewrite(traced, decided, known)
        super().__init__(root, decided, backbone, original, calls, "forward")


class Candidates(Bound):
    """The whole network, some of whose branches can be skipped from one call to the next.

    It is made once and serves any set of branches, for inference alone: it keeps no less for a
    backward than PyTorch does, and always computes what stands for a skipped sum in new memory.

    Args:
        original: Of the model.
        backbone: The rewritten network, whose tensors are used.
        plan: Its plan.
        config: The user's choices.
        calls: What it computes with.

    Raises:
        DA3Error: The model does not know its network any more.
    """

    def __init__(
        self,
        original: Original,
        backbone: nn.Module,
        plan: Plan,
        config: DA3Config,
        calls: Calls,
    ) -> None:
        with _traced_again(original, backbone, plan) as (traced, inputs):
            found = [
                (part.gm, [(n, _Sum.of(b)) for n, b in branches.items()])
                for part, branches in found_again(traced, plan)
            ]
            names = {name for _, sums in found for name, _ in sums}
            check_not_computed(traced, plan, {b.name for b in plan.branches} - names)
            known = dataclasses.replace(config, head=plan.head)
            decided = make_plan(traced, known, inputs, hosts_of=plan)
            parts = tuple(
                dataclasses.replace(part, regions=(), prologue=None) for part in decided.parts
            )
            decided = dataclasses.replace(decided, parts=parts)
            root = rewrite(traced, decided, known)
        super().__init__(root, decided, backbone, original, calls, "forward")
        self._found = [(gm, gm.graph, sums) for gm, sums in found if sums]

    @contextmanager
    def without(self, skipped: Collection[str]) -> Iterator[None]:
        """In the block, calls skip these branches."""
        try:
            for gm, graph, sums in self._found:
                gone = [each for name, each in sums if name in skipped]
                if gone:
                    gm.graph = _skipping(gm, graph, gone)
            yield
        finally:
            for gm, graph, _ in self._found:
                if gm.graph is not graph:
                    gm.graph = graph


@dataclasses.dataclass(frozen=True)
class _Sum:
    """A branch by the names of its nodes, which rewriting leaves."""

    total: str
    shortcut: int
    writes: bool
    nodes: tuple[str, ...]

    @classmethod
    def of(cls, branch: Any) -> _Sum:
        names = tuple(node.name for node in branch.nodes)
        return cls(branch.total.name, branch.shortcut, branch.writes, names)


def _skipping(gm: fx.GraphModule, graph: fx.Graph, sums: Collection[_Sum]) -> fx.Graph:
    """A copy of a graph without these branches."""
    edited = fx.Graph(owning_module=gm)
    edited.output(edited.graph_copy(graph, {}))
    for each in sums:
        nodes = {node.name: node for node in edited.nodes}
        if each.total in nodes:  # or it is in a branch that is gone
            skip_(edited, nodes[each.total], each.shortcut, copies=not each.writes)
            remove_dead_(gm, edited, each.nodes)
    return edited


@contextmanager
def _traced_again(
    original: Original, backbone: nn.Module, plan: Plan
) -> Iterator[tuple[Traced, Any]]:
    """The network, traced as it was before, and its arguments if they are known; to be rewritten.

    Raises:
        DA3Error: The model does not know its network any more.
    """
    network = original.network
    if network is None:
        raise DA3Error(
            "Branches cannot be skipped: a model that was saved forgets the network that it was "
            "made from. Convert the network here, and load the domains."
        )
    mode = fake_mode_of(network) or nullcontext()
    with warnings.catch_warnings(), mode, in_precision(original.precision):
        warnings.simplefilter("ignore")  # they were said of the whole network
        inputs = original.inputs
        if inputs is not None:
            taken = partial(without_values_of, network=network, backbone=backbone)
            inputs = tree_map_only(Tensor, taken, inputs)
        yield trace(network, inputs, dict(plan.python)), inputs
