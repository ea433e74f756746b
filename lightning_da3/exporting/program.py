"""A program: a graph of PyTorch's operations, and what goes in and comes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from lightning_da3.torch_private.trees import tree_leaves

Run = Callable[..., Any]


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


class Program(NamedTuple):
    """What is written to a file.

    Attributes:
        exported: Takes `inputs` and returns a tuple of `outputs`.
        inputs: What goes in, in order.
        outputs: What comes out, in order.
    """

    exported: ExportedProgram
    inputs: Sequence[Port]
    outputs: Sequence[Port]


def tensors_in(output: Any) -> list[Tensor]:
    """The tensors of an output, in order."""
    return [y for y in tree_leaves(output) if isinstance(y, Tensor)]


class _Held(nn.Module):
    """Runs with what it holds.

    Args:
        parts: All modules with tensors that the run reads.
        run: Takes the network's inputs.
    """

    def __init__(self, parts: Mapping[str, nn.Module], run: Run) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.run = run

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensors_in(self.run(*tensors)))


@torch.no_grad()
def program_of(
    run: Run,
    backbone: nn.Module,
    domain: nn.Module | None,
    inputs: Sequence[Port],
) -> Program:
    """The program of one domain.

    Args:
        run: Computes the network's output for that domain.
        backbone: The network.
        domain: What the domain owns; None: the backbone runs alone.
        inputs: What the network takes.
    """
    parts = {"backbone": backbone} if domain is None else {"backbone": backbone, "domain": domain}
    batch = Dim("batch", min=1)
    shapes = tuple({0: batch} if port.batched else None for port in inputs)
    examples = tuple(port.example for port in inputs)
    exported = export(_Held(parts, run), examples, dynamic_shapes=(shapes,))
    outputs = tensors_in(run(*examples))
    names = ["output"] if len(outputs) == 1 else [f"output_{i}" for i in range(len(outputs))]
    count = len(inputs[0].example) if inputs[0].batched else None
    return Program(
        exported,
        inputs,
        [
            Port(name, y, count is not None and y.dim() > 0 and len(y) == count)
            for name, y in zip(names, outputs, strict=True)
        ],
    )
