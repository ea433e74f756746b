"""The training step of a domain as a file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_da3.errors import ConfigError, ConversionError, DA3Error, InputError
from lightning_da3.exporting.inference import Format, check_graphs, checked_inputs, input_names
from lightning_da3.exporting.manifest import START, manifest_of
from lightning_da3.exporting.optimizers import OPTIMIZERS, Optimizer, accumulating
from lightning_da3.exporting.program import Port, Program, exported_of
from lightning_da3.exporting.recording import record
from lightning_da3.exporting.steps import GivenNoise, Loss, Step, the_tensor_of
from lightning_da3.exporting.writing import Example, check_format, check_target, write_program
from lightning_da3.formatting import shown
from lightning_da3.nn.call import Executed, Noise
from lightning_da3.planning.plan import Plan

Named = Mapping[str, Tensor]
TOLERANCE = 1e-2  # of the largest value: float32 moves single values to the next 8-bit code
ROUNDING = 1e-5  # of a value: what dozens of layers make of that of float32
NEARBY = 3  # such inputs; a single one may happen to decide as the model did
LOSSES: dict[str, Loss] = {"cross_entropy": F.cross_entropy}


class Model(Protocol):
    """What is used here of a DA3Model."""

    plan: Plan
    config: Any

    def run_noisy(
        self, name: str | None, noise: Noise | None, *args: Any
    ) -> tuple[Any, list[tuple[str, Executed]]]:
        """The output for a domain, and how much of every host was executed, with its name."""


def export_training(
    model: Model,
    network: nn.Module,
    name: str,
    domain: nn.Module,
    trained: Named,
    about: Mapping[str, Any],
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    loss: str | Loss,
    optimizer: str,
    format: Format,  # noqa: A002 - the public argument's name
    dynamic_batch: bool,
    accumulate: bool,
    example_targets: Tensor | None,
    start: Callable[[Path], None],
) -> Path:
    """See `DA3Model.export_training`.

    Args:
        model: The model.
        network: Its rewritten network that the domain computes with.
        name: One of its domains.
        domain: What the domain owns.
        trained: Those of its tensors that learn, by their names in its file.
        about: What the domain's own file says of it, and of its model.
        path: The file.
        example_inputs: A tensor, or a tuple of the network's arguments.
        loss: See `DA3Model.export_training`.
        optimizer: See `DA3Model.export_training`.
        format: See `DA3Model.export_training`.
        dynamic_batch: See `DA3Model.export_training`.
        accumulate: See `DA3Model.export_training`.
        example_targets: See `DA3Model.export_training`.
        start: Writes the domain as it is to a file, which goes beside the other.
    """
    check_format(format, dynamic_batch)
    check_target(path)
    steps = _optimizer(optimizer, accumulate)
    computes_loss = _loss(loss)
    check_graphs(model.plan)
    inputs = checked_inputs(example_inputs, dynamic_batch)

    def run(noise: Noise | None, *args: Tensor) -> tuple[Any, list[tuple[str, Executed]]]:
        return model.run_noisy(name, noise, *args)

    noise = GivenNoise({}, None, len(inputs[0]) if inputs[0].dim() else 1)
    with torch.no_grad():
        output, executed = run(noise, *inputs)
    targets = _targets(the_tensor_of(output), example_targets)
    gate = model.config.cell_gates if executed else None
    step = Step(
        {"backbone": network, "domain": domain},
        run,
        list(trained),
        input_names(len(inputs)),
        computes_loss,
        None if gate is None else gate.weight,
        noise.places if gate is not None and gate.noise else None,
        steps,
    )
    own = {n: p.detach() for n, p in trained.items()}
    ports = _ports(step, inputs, targets, own, noise.columns, dynamic_batch)
    frozen = step.frozen
    examples = [_example(step, frozen, batch) for batch in _batches(ports)]
    program = _recorded(model.plan.network, step, frozen, ports)
    said = manifest_of(about, "training", program, dynamic_batch)
    said["loss"] = loss if isinstance(loss, str) else getattr(loss, "__qualname__", str(loss))
    said["optimizer"] = {"name": optimizer, **steps.settings}
    said["accumulate"] = accumulate
    beside = Path(path).with_name(Path(path).name + START)
    return write_program(
        program, path, format, said, examples, TOLERANCE, also=partial(start, beside)
    )


def _optimizer(name: object, accumulate: object) -> Optimizer:
    if not isinstance(name, str) or name not in OPTIMIZERS:
        raise ConfigError(f"`optimizer` must be one of {list(OPTIMIZERS)}, got {shown(name)}.")
    if not isinstance(accumulate, bool):
        raise ConfigError(f"`accumulate` must be a bool, got {shown(accumulate)}.")
    return accumulating(OPTIMIZERS[name]) if accumulate else OPTIMIZERS[name]


def _loss(loss: object) -> Loss:
    if isinstance(loss, str) and loss in LOSSES:
        return LOSSES[loss]
    if isinstance(loss, str) or not callable(loss):
        raise ConfigError(
            f"`loss` must be one of {list(LOSSES)}, or a callable that takes the network's output "
            f"and the targets and gives a number, got {shown(loss)}."
        )
    return loss


def _targets(output: Tensor, examples: Tensor | None) -> Tensor:
    """The example targets, or classes for an output (N, C, ..)."""
    if isinstance(examples, Tensor):
        if examples.dim() and output.dim() and len(examples) in (len(output), 1):
            return examples.detach().expand(len(output), *examples.shape[1:])
        raise InputError(
            f"`example_targets` must have one target for every sample, got shape "
            f"{tuple(examples.shape)} for an output of shape {tuple(output.shape)}."
        )
    if examples is not None:
        raise InputError(f"`example_targets` must be a tensor, got {shown(examples)}.")
    if output.dim() < 2:
        raise InputError(
            f"The output has shape {tuple(output.shape)}, which is none of scores (N, classes, "
            "*in). Give `example_targets`, and a callable `loss`."
        )
    return torch.zeros((len(output), *output.shape[2:]), dtype=torch.int64)


def _ports(
    step: Step,
    inputs: Sequence[Tensor],
    targets: Tensor,
    trained: Named,
    columns: int,
    dynamic_batch: bool,
) -> list[Port]:
    ports = [Port(n, x, dynamic_batch) for n, x in zip(step.inputs, inputs, strict=True)]
    ports.append(Port("targets", targets, dynamic_batch))
    if step.gate_weight is not None:
        ports.append(Port("gate_target", torch.tensor(0.5)))
    if step.noise is not None:
        ports.append(Port("noise", torch.zeros(len(targets), columns), dynamic_batch))
    ports += [Port(name, tensor) for name, tensor in trained.items()]
    return ports + step.optimizer.ports(trained)


def _recorded(network: str, step: Step, frozen: Named, ports: Sequence[Port]) -> Program:
    try:
        graph, names = record(step.outputs, frozen, ports)
        with torch.no_grad():
            exported = exported_of(graph, ports)
            outputs = graph(*(port.example for port in ports))
    except DA3Error:
        raise
    except Exception as error:  # whatever cannot be followed
        raise ConversionError(
            f"The training step of {network} cannot be exported: "
            f"{type(error).__name__}: {error}. A shape or a branch that depends on values, or on "
            "the number of samples, has no place in a file, in the loss neither: try "
            "dynamic_batch=False, or rewrite that part."
        ) from error
    return Program(exported, ports, [*map(Port, names, outputs)])


def _batches(ports: Sequence[Port]) -> list[dict[str, Tensor]]:
    """What a file is checked with: a domain that has learned, in batches of two sizes."""
    numbers = torch.Generator().manual_seed(0)

    def filled(port: Port, count: int | None) -> Tensor:
        x = port.example
        if port.batched:
            assert count is not None
            x = x[:1] if count == 1 else torch.cat((x, x[:1]))
        if port.name in _SAID:
            return torch.full_like(x, _SAID[port.name])
        if not x.is_floating_point() or port.name.startswith("input"):
            return x
        drawn = torch.randn(x.shape, generator=numbers).to(x)
        moved = 1.0 + drawn.abs() if port.name.startswith("moment2.") else x + 0.1 * drawn
        # as it lies: kernels differ, even where sides are 1
        return torch.empty_like(x).copy_(moved)

    counts = (1, 3) if any(port.batched for port in ports) else (None,)
    found = [{port.name: filled(port, count) for port in ports} for count in counts]
    if "apply" in found[0]:
        found.append({**found[0], "apply": torch.tensor(0.0)})
    return found


_SAID = {"learning_rate": 1.0, "step": 3.0, "gate_target": 0.5, "weight": 0.25, "apply": 1.0}


def _example(step: Step, frozen: Named, given: Named) -> Example:
    """Inputs of the program, and what the model itself gives for them."""
    numbers = torch.Generator().manual_seed(1)

    def nearby() -> list[Tensor]:
        moved = dict(given)
        for name in step.inputs:
            if moved[name].is_floating_point():
                drawn = torch.randn(moved[name].shape, generator=numbers).to(moved[name])
                moved[name] = torch.addcmul(moved[name], moved[name], drawn, value=ROUNDING)
        return list(step.outputs(frozen, moved).values())

    expected = list(step.outputs(frozen, given).values())
    return Example(list(given.values()), expected, [nearby() for _ in range(NEARBY)])
