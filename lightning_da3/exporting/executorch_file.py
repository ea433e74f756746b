"""Programs as files of ExecuTorch, whose runtime is C++ for phones and microcontrollers."""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram, export

from lightning_da3.errors import ConversionError
from lightning_da3.exporting.manifest import KEY
from lightning_da3.exporting.program import Program

Tensors = Sequence[Tensor]
_XNNPACK = ("ConvolutionConfig", "AddmmConfig", "LinearConfig", "MMConfig")


def write_executorch(
    program: Program, path: Path, manifest: dict[str, Any], *, xnnpack: bool = False
) -> Callable[[Tensors], Tensors]:
    """Write a program and its manifest, and give back what runs the file.

    Args:
        program: What to write; of fixed shapes.
        path: The file.
        manifest: Gets the bytes of the arena that the runtime needs, and the operations.
        xnnpack: Convolutions and products by constants are computed by XNNPACK, which packs their
            weights in memory of its own; else everything by the runtime's portable kernels.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own calls and imports
        made = _made(program, json.dumps(manifest, sort_keys=True), xnnpack)
        plan = made.executorch_program.execution_plan[0]
        names = (f"{op.name}.{op.overload}".rstrip(".") for op in plan.operators)
        manifest["planned_peak_bytes"] = sum(plan.non_const_buffer_sizes)
        manifest["operations"] = sorted({*names, *(d.id for d in plan.delegates)})
        manifest["versions"] = {**manifest["versions"], "executorch": version("executorch")}
        path.write_bytes(made.buffer)
        return _run(path)


def _made(program: Program, about: str, xnnpack: bool) -> Any:
    exir: Any = importlib.import_module("executorch.exir")
    try:
        edge = exir.to_edge_transform_and_lower(
            _in_order(program.exported, [port.example for port in program.inputs]),
            partitioner=[_xnnpack()] if xnnpack else [],
            # it refuses operations that its portable kernels have
            compile_config=exir.EdgeCompileConfig(_check_ir_validity=False),
            constant_methods={KEY: about},
        )
        return edge.to_executorch()
    except Exception as error:  # of many kinds
        raise ConversionError(
            f"ExecuTorch cannot translate the network: {type(error).__name__}: {error}. Write "
            "format='onnx' or 'pt2', or replace the layers that it names."
        ) from error


def _xnnpack() -> Any:
    found: Any = importlib.import_module("executorch.backends.xnnpack.partition.config")
    chosen = [getattr(found.gemm_configs, name) for name in _XNNPACK]
    part: Any = importlib.import_module("executorch.backends.xnnpack.partition.xnnpack_partitioner")
    return part.XnnpackPartitioner(configs=chosen, per_op_mode=True)


def _run(path: Path) -> Callable[[Tensors], Tensors]:
    runtime: Any = importlib.import_module("executorch.runtime").Runtime.get()
    try:
        # to be kept: it holds the bytes that its methods read
        program = runtime.load_program(path.read_bytes())
        program.load_method("forward")
    except RuntimeError as error:
        raise ConversionError(
            f"ExecuTorch cannot load the exported network: {error}. Write format='onnx' or 'pt2'."
        ) from error

    def run(inputs: Tensors) -> Tensors:
        try:
            method = program.load_method("forward")
            return cast(Tensors, method.execute([x.detach().contiguous() for x in inputs]))
        except RuntimeError as error:
            raise ConversionError(
                f"ExecuTorch cannot run the exported network: {error}. Write format='onnx' or "
                "'pt2'."
            ) from error

    return run


def _in_order(exported: ExportedProgram, inputs: Tensors) -> ExportedProgram:
    """The same program, all of whose tensors lie in the order of their axes.

    Portable kernels take no tensors of two orders.
    """
    graph = exported.module()
    for module in graph.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(_contiguous(parameter), requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, _contiguous(buffer))
    with torch.no_grad():
        return export(_InOrder(graph), tuple(map(_contiguous, inputs)))


def _contiguous(x: Tensor) -> Tensor:
    return x.detach().clone(memory_format=torch.contiguous_format)


class _InOrder(nn.Module):
    """Runs a graph so that nothing in it asks for an order of its own."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        self.gm = graph

    def forward(self, *tensors: Tensor) -> Any:
        """What the graph computes."""
        return _Contiguous(self.gm).run(*tensors)


class _Contiguous(fx.Interpreter):
    """Takes every order of axes for that of the axes themselves."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """One operation."""
        args = tuple(map(_plain, args))
        return super().call_function(target, args, {k: _plain(v) for k, v in kwargs.items()})

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Guards on the inputs, which are those that the program was made with."""
        if target == "_guards_fn":
            return None
        return super().call_module(target, args, kwargs)


def _plain(value: Any) -> Any:
    return torch.contiguous_format if isinstance(value, torch.memory_format) else value
