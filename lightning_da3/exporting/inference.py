"""The inference of a domain as a file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from lightning_da3.errors import ConfigError, ConversionError, DA3Error, InputError
from lightning_da3.exporting.manifest import manifest_of
from lightning_da3.exporting.program import Port, Program, Run, program_of, tensors_in
from lightning_da3.exporting.writing import Example, check_format, check_target, write_program
from lightning_da3.formatting import shown
from lightning_da3.planning.plan import Plan

Format = Literal["onnx", "pt2", "executorch", "executorch-xnnpack"]
Place = Literal["inside", "inputs"]
PLACES = ("inside", "inputs")


class Model(Protocol):
    """What is used here of a DA3Model."""

    plan: Plan

    def run_domain(self, name: str | None, *args: Any) -> Any:
        """The output for a domain, whichever is active."""


def export_inference(
    model: Model,
    network: nn.Module,
    name: str | None,
    domain: nn.Module | None,
    parameters: Mapping[str, Tensor],
    about: Mapping[str, Any],
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    format: Format,  # noqa: A002 - the public argument's name
    domains: Place,
    dynamic_batch: bool,
) -> Path:
    """See `DA3Model.export`.

    Args:
        model: The model.
        network: Its rewritten network that the domain computes with.
        name: One of its domains; None: the backbone alone.
        domain: What the domain owns.
        parameters: Those of it that the network reads, by their names in its file.
        about: What the domain's own file says of it, and of its model.
        path: The file.
        example_inputs: A tensor, or a tuple of the network's arguments.
        format: See `DA3Model.export`.
        domains: See `DA3Model.export`.
        dynamic_batch: See `DA3Model.export`.
    """
    check_format(format, dynamic_batch)
    check_target(path)
    _check_place(domains, name)
    check_graphs(model.plan)
    inputs = checked_inputs(example_inputs, dynamic_batch)
    names = input_names(len(inputs))
    ports = [Port(n, x, dynamic_batch) for n, x in zip(names, inputs, strict=True)]
    given = [Port(n, p.detach()) for n, p in parameters.items()] if domains == "inputs" else []
    run = partial(model.run_domain, name)
    program = _recorded(run, model.plan.network, network, domain, ports, given)
    own = [port.example for port in given]
    with torch.no_grad():
        examples = [
            Example([*batch, *own], tensors_in(run(*batch)))
            for batch in _batches(inputs, dynamic_batch)
        ]
    said = manifest_of(about, "inference", program, dynamic_batch)
    return write_program(program, path, format, said, examples)


def _check_place(domains: object, name: str | None) -> None:
    if not isinstance(domains, str) or domains not in PLACES:
        raise ConfigError(f"`domains` must be one of {list(PLACES)}, got {shown(domains)}.")
    if domains == "inputs" and name is None:
        raise ConfigError(
            "domains='inputs' needs a domain, whose tensors become inputs, got domain=None. Name "
            "one of `domains`: all with as many classes can then be fed."
        )


def check_graphs(plan: Plan) -> None:
    """Refuse networks with parts that no graph holds."""
    if plan.python:
        parts = "; ".join(f"{path or 'the network'!r}: {why}" for path, why in plan.python)
        raise ConversionError(
            f"{plan.network} cannot be exported: parts of it stay Python, which other runtimes do "
            f"not have ({parts}). Rewrite these parts without what is named, or export a network "
            "that does not hold them."
        )


def _recorded(
    run: Run,
    name: str,
    network: nn.Module,
    domain: nn.Module | None,
    inputs: Sequence[Port],
    given: Sequence[Port],
) -> Program:
    try:
        return program_of(run, network, domain, inputs, given)
    except DA3Error:
        raise
    except Exception as error:  # whatever torch.export cannot follow
        raise ConversionError(
            f"{name} cannot be exported: {type(error).__name__}: {error}. A shape or "
            "a branch that depends on values, or on the number of samples, has no place in a file: "
            "try dynamic_batch=False, or rewrite that part."
        ) from error


def checked_inputs(example_inputs: Any, dynamic_batch: bool) -> list[Tensor]:
    """The examples, of at least two samples if there may be any number."""
    given = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    tensors = [x.detach() for x in given if isinstance(x, Tensor)]
    if not given or len(tensors) < len(given):
        kinds = ", ".join(type(x).__name__ for x in given)
        raise InputError(
            "`example_inputs` must be a tensor or a tuple of tensors, as the network takes them, "
            f"got ({kinds})."
        )
    if not dynamic_batch:
        return tensors
    counts = [len(x) if x.dim() else 0 for x in tensors]
    if len(set(counts)) > 1 or not counts[0]:
        raise InputError(
            "With dynamic_batch=True the first axis of every input is that of the samples, at "
            f"least one; got shapes {[tuple(x.shape) for x in tensors]}. Give inputs like that, "
            "or say dynamic_batch=False."
        )
    return [torch.cat((x, x)) for x in tensors] if counts[0] == 1 else tensors


def input_names(count: int) -> list[str]:
    """What the network's arguments are called in a file."""
    return ["input"] if count == 1 else [f"input_{i}" for i in range(count)]


def _batches(inputs: Sequence[Tensor], dynamic_batch: bool) -> list[list[Tensor]]:
    """What a file is checked with: the examples, and batches of other sizes."""
    if not dynamic_batch:
        return [list(inputs)]
    return [[x[:1] for x in inputs], [torch.cat((x, x[:1])) for x in inputs]]
