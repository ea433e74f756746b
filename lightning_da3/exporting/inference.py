"""The inference of a domain as a file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_da3.errors import ConfigError, ConversionError, DA3Error, InputError
from lightning_da3.exporting.manifest import manifest_of
from lightning_da3.exporting.program import Port, Program, program_of
from lightning_da3.exporting.steps import Model, Step, inference, tensors_in
from lightning_da3.exporting.writing import check_format, write_program
from lightning_da3.formatting import shown

Format = Literal["onnx", "pt2"]
Place = Literal["inside", "inputs"]
PLACES = ("inside", "inputs")


def export_inference(
    model: Model,
    domain: str | None,
    path: str | os.PathLike[str],
    example_inputs: Any,
    about: Mapping[str, Any],
    parameters: Mapping[str, Tensor],
    *,
    format: Format,  # noqa: A002 - the public argument's name
    domains: Place,
    dynamic_batch: bool,
) -> Path:
    """See `DA3Model.export`.

    Args:
        model: A `DA3Model`.
        domain: One of its domains; None: the backbone alone.
        path: The file.
        example_inputs: A tensor, or a tuple of the network's arguments.
        about: What the domain's own file says of it, and of its model.
        parameters: The domain's, by their names in its file.
        format: See `DA3Model.export`.
        domains: See `DA3Model.export`.
        dynamic_batch: See `DA3Model.export`.
    """
    check_format(format)
    if domains not in PLACES:
        raise ConfigError(f"`domains` must be one of {list(PLACES)}, got {shown(domains)}.")
    check_exportable(model)
    inputs = checked_inputs(example_inputs, dynamic_batch)
    step = Step(model, domain, parameters if domains == "inputs" else {}, inputs, dynamic_batch)
    given = [*step.ports, *step.domain_ports]
    program = recorded_program(model, step, given)
    examples = []
    for batch in batches(inputs, dynamic_batch):
        with torch.no_grad():
            output, _ = model.run_domain(domain, None, *batch)
        tensors = [*batch, *(port.example for port in step.domain_ports)]
        examples.append(([t.cpu() for t in tensors], [y.cpu() for y in tensors_in(output)]))
    outputs = [
        Port(name, y, y.dim() > 0 and len(y) == len(inputs[0]))
        for name, y in zip(program.outputs, examples[0][1], strict=True)
    ]
    said = manifest_of(about, "inference", given, outputs, dynamic_batch)
    return write_program(program, path, format, said, examples)


def check_exportable(model: Model) -> None:
    """Refuse networks with parts that no graph holds.

    Raises:
        ConversionError: There are some.
    """
    if model.plan.python:
        parts = "; ".join(f"{path or 'the network'!r}: {why}" for path, why in model.plan.python)
        raise ConversionError(
            f"{model.plan.network} cannot be exported: parts of it stay Python, which other "
            f"runtimes do not have ({parts}). Rewrite these parts without what is named, or export "
            "a network that does not hold them."
        )


def recorded_program(model: Model, step: Step, given: Sequence[Port]) -> Program:
    """The program of one domain's inference.

    Raises:
        ConversionError: It cannot be recorded.
    """
    try:
        return program_of(inference(step), step.frozen, given)
    except DA3Error:
        raise
    except Exception as error:
        raise ConversionError(
            f"{model.plan.network} cannot be exported: {type(error).__name__}: {error}. A shape or "
            "a branch that depends on values, or on the number of samples, has no place in a file: "
            "try dynamic_batch=False, or rewrite that part."
        ) from error


def checked_inputs(example_inputs: Any, dynamic_batch: bool) -> list[Tensor]:
    """The examples as a list, of at least two samples if there may be any number.

    Raises:
        InputError: They are no tensors with one first axis.
    """
    given = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    tensors = [x.detach() for x in given if isinstance(x, Tensor)]
    if not given or len(tensors) < len(given):
        kinds = ", ".join(type(x).__name__ for x in given)
        raise InputError(
            f"`example_inputs` must be a tensor or a tuple of tensors, as the network takes them, "
            f"got ({kinds})."
        )
    counts = [len(x) if x.dim() else None for x in tensors]
    if not dynamic_batch:
        return tensors
    if len(set(counts)) > 1 or not counts[0]:
        raise InputError(
            "With dynamic_batch=True the first axis of every input is that of the samples, at "
            f"least one; got shapes {[tuple(x.shape) for x in tensors]}. Give inputs like that, "
            "or say dynamic_batch=False."
        )
    return [torch.cat((x, x)) for x in tensors] if counts[0] == 1 else tensors


def batches(inputs: Sequence[Tensor], dynamic_batch: bool) -> list[list[Tensor]]:
    """What an exported program is checked with: the examples, and batches of other sizes."""
    if not dynamic_batch:
        return [list(inputs)]
    return [list(inputs), [x[:1] for x in inputs], [torch.cat((x, x[:1])) for x in inputs]]
