"""A program: a graph of kernels, and what goes in and comes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, export

from lightning_da3.exporting.lowering import Lowered
from lightning_da3.ops.exportable import exportable
from lightning_da3.torch_private.decompositions import TABLE
from lightning_da3.torch_private.programs import recorded


class Port(NamedTuple):
    """A tensor that goes in or comes out.

    Attributes:
        name: Its name in the file.
        example: A tensor of its shape and type.
        batched: The first axis is that of the samples, and may be of any size.
    """

    name: str
    example: Tensor
    batched: bool = False


@dataclass(frozen=True)
class Program:
    """What is exported.

    Attributes:
        graph: Takes `inputs` and returns a tuple of `outputs`; frozen tensors are its buffers.
        inputs: What goes in, in order.
        outputs: Names of what comes out, in order.
    """

    graph: nn.Module
    inputs: list[Port]
    outputs: list[str]

    def exported(self) -> ExportedProgram:
        """As PyTorch's own kind of program, with a batch of any size where a port has one."""
        batch = Dim("batch", min=1)
        shapes = tuple({0: batch} if port.batched else None for port in self.inputs)
        examples = tuple(port.example for port in self.inputs)
        with torch.no_grad():
            return export(self.graph, examples, dynamic_shapes=(shapes,))


def program_of(
    function: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Mapping[str, Tensor]],
    frozen: Mapping[str, Tensor],
    inputs: Sequence[Port],
) -> Program:
    """The program that computes a function.

    Args:
        function: Takes frozen tensors and inputs by name, and gives outputs by name.
        frozen: Tensors that stay what they are.
        inputs: What goes in.
    """
    names: list[str] = []

    def flat(*tensors: Tensor) -> list[Tensor]:
        with exportable():
            found = function(
                dict(zip(frozen, tensors, strict=False)),
                dict(zip([p.name for p in inputs], tensors[len(frozen) :], strict=True)),
            )
        names[:] = found
        return list(found.values())

    tensors = [t.detach() for t in frozen.values()] + [port.example for port in inputs]
    batched = [False] * len(frozen) + [port.batched for port in inputs]
    gm = recorded(flat, tensors, batched, TABLE)
    _hold_(gm, frozen)
    return Program(Lowered(gm), list(inputs), names)


def _hold_(gm: fx.GraphModule, frozen: Mapping[str, Tensor]) -> None:
    """Let the graph have the frozen tensors, as its first inputs, as buffers instead."""
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    for node, (name, tensor) in zip(placeholders, frozen.items(), strict=False):
        if node.users:
            attribute = _buffer(gm, name, tensor)
            with gm.graph.inserting_before(node):
                get = gm.graph.get_attr(attribute)
            get.meta = dict(node.meta)
            node.replace_all_uses_with(get)
        gm.graph.erase_node(node)
    gm.recompile()


def _buffer(gm: fx.GraphModule, name: str, tensor: Tensor) -> str:
    """Register a buffer, and return the name it got."""
    attribute = f"frozen_{name}".replace(".", "_")
    while hasattr(gm, attribute):
        attribute += "_"
    gm.register_buffer(attribute, tensor.detach())
    return attribute
