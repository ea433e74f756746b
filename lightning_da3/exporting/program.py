"""A program: a graph of PyTorch's operations, and what goes in and comes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torch.func import functional_call

from lightning_da3.ops.exportable import exportable
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


class Held(nn.Module):
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

    def forward(self, *args: Any) -> Any:
        """What the run returns."""
        return self.run(*args)


class _Given(nn.Module):
    """Runs with tensors of a domain that come last of what it takes."""

    def __init__(
        self, backbone: nn.Module, domain: nn.Module, names: Sequence[str], run: Run
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.names = [f"domain.{name}" for name in names]
        # hidden from `torch.export`: the domain's own tensors have no place in the file
        self.inner = (Held({"domain": domain}, run),)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(tensors) - len(self.names)
        given = dict(zip(self.names, tensors[count:], strict=True))
        return functional_call(self.inner[0], given, tensors[:count])  # type: ignore[no-any-return]


def exported_of(graph: nn.Module, ports: Sequence[Port]) -> ExportedProgram:
    """A graph as PyTorch's own kind of program, for any batch where a port has one."""
    batch = Dim("batch", min=1)
    shapes = tuple({0: batch} if port.batched else None for port in ports)
    return export(graph, tuple(port.example for port in ports), dynamic_shapes=(shapes,))


@torch.no_grad()
def program_of(
    run: Run,
    backbone: nn.Module,
    domain: nn.Module | None,
    inputs: Sequence[Port],
    given: Sequence[Port],
) -> Program:
    """The program of one domain.

    Args:
        run: Computes the network's output for that domain.
        backbone: The network.
        domain: What the domain owns; None: the backbone runs alone.
        inputs: What the network takes.
        given: Tensors of the domain that go in, too, by their names in it.
    """
    parts = {"backbone": backbone} if domain is None else {"backbone": backbone, "domain": domain}

    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensors_in(run(*tensors)))

    graph: nn.Module = Held(parts, flat)
    if domain is not None and given:
        graph = _Given(backbone, domain, [port.name for port in given], flat)
    ports = [*inputs, *given]
    outputs = flat(*(port.example for port in inputs))
    names = ["output"] if len(outputs) == 1 else [f"output_{i}" for i in range(len(outputs))]
    count = len(inputs[0].example) if inputs[0].batched else None
    with exportable():
        exported = exported_of(graph, ports)
    return Program(
        exported,
        ports,
        [
            Port(name, y, count is not None and y.dim() > 0 and len(y) == count)
            for name, y in zip(names, outputs, strict=True)
        ],
    )
