"""A function of named tensors, recorded as a graph in which only inputs are left open."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_da3.exporting.lowering import Lowered
from lightning_da3.exporting.program import Port
from lightning_da3.ops.exportable import exportable
from lightning_da3.torch_private.decompositions import TABLE
from lightning_da3.torch_private.programs import recorded

Named = Mapping[str, Tensor]
Function = Callable[[Named, Named], Mapping[str, Tensor]]


class Recorded(NamedTuple):
    """A function as a graph.

    Attributes:
        graph: Takes the inputs and returns a tuple; frozen tensors are its buffers.
        outputs: Names of what it returns, in order.
    """

    graph: nn.Module
    outputs: list[str]


def record(function: Function, frozen: Named, inputs: Sequence[Port]) -> Recorded:
    """The graph of a function, its ops in their exportable form.

    Args:
        function: Takes frozen tensors and inputs by name, and gives outputs by name.
        frozen: Tensors that stay what they are.
        inputs: What goes in.
    """
    names: list[str] = []

    def flat(*tensors: Tensor) -> list[Tensor]:
        own, given = tensors[: len(frozen)], tensors[len(frozen) :]
        with exportable(), sdpa_kernel(SDPBackend.MATH):  # of attention, in plain products
            found = function(
                dict(zip(frozen, own, strict=True)),
                dict(zip([port.name for port in inputs], given, strict=True)),
            )
        names[:] = found
        return list(found.values())

    tensors = [*frozen.values(), *[port.example for port in inputs]]
    batched = [False] * len(frozen) + [port.batched for port in inputs]
    gm = recorded(flat, tensors, batched, TABLE)
    _hold_(gm, frozen)
    return Recorded(Lowered(gm), names)


def _hold_(gm: fx.GraphModule, frozen: Named) -> None:
    """Let the graph have the frozen tensors, as its first inputs, as buffers instead."""
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    for i, (node, tensor) in enumerate(zip(placeholders, frozen.values(), strict=False)):
        if node.users:
            gm.register_buffer(f"frozen_{i}", tensor)
            with gm.graph.inserting_before(node):
                get = gm.graph.get_attr(f"frozen_{i}")
            get.meta = dict(node.meta)
            node.replace_all_uses_with(get)
        gm.graph.erase_node(node)
    gm.recompile()
