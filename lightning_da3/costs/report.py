"""What one training step costs, to print or to hand on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from lightning_da3.budget.policy import how_split
from lightning_da3.costs.rows import HEADINGS, Row
from lightning_da3.costs.text import ratio, table, where
from lightning_da3.formatting import format_bytes, format_count
from lightning_da3.memory import StepPrediction
from lightning_da3.planning.plan import Plan

TOTALS = (
    "saved_activation_bytes",
    "peak_bytes",
    "peak_node",
    "peak_phase",
    "flops_forward",
    "flops_backward",
)


@dataclasses.dataclass(frozen=True)
class StepCosts:
    """What one training step costs. Printed, it is a table, node by node.

    Attributes:
        plan: The model's plan.
        inputs: The shapes of the network's inputs.
        guessed: Whether the shapes were guessed.
        ours: The step of one domain.
        finetune: The step of the whole network; None if that is not known.
        rows: The costs of nodes, adapters and regions, in the order in which data meets them.
        domain_parameters: How many numbers one domain learns.
        domain_file_bytes: The size of a domain's file.
        finetune_parameters: How many numbers fine-tuning learns.
        finetune_file_bytes: The size of the tensors of the network's state.
        no_finetune: Why the costs of fine-tuning are not known.
        budget_bytes: The budget that the step is held to, or None.
        parts: The samples of every part of the batch, if it is split to stay within the budget.
        again: How many of the parts are computed again in the backward.
        accumulated: The parts are training steps whose gradients add up, not microbatches.
        kept: The modules of regions that keep what they could compute again, as there is room.
    """

    plan: Plan
    inputs: tuple[tuple[int, ...], ...]
    guessed: bool
    ours: StepPrediction
    finetune: StepPrediction | None
    rows: tuple[Row, ...] = dataclasses.field(repr=False)
    domain_parameters: int
    domain_file_bytes: int
    finetune_parameters: int | None = None
    finetune_file_bytes: int | None = None
    no_finetune: str = ""
    budget_bytes: int | None = None
    parts: tuple[int, ...] = ()
    again: int = 0
    accumulated: bool = False
    kept: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, for programs; bytes and counts."""
        finetune = None
        if self.finetune is not None:
            finetune = {
                **_totals(self.finetune),
                "domain_parameters": self.finetune_parameters,
                "domain_file_bytes": self.finetune_file_bytes,
            }
        return {
            "network": self.plan.network,
            "inputs": [list(shape) for shape in self.inputs],
            "inputs_guessed": self.guessed,
            **_totals(self.ours),
            "budget_bytes": self.budget_bytes,
            "parts": list(self.parts),
            "parts_again": self.again,
            "accumulated": self.accumulated,
            "kept": list(self.kept),
            "domain_parameters": self.domain_parameters,
            "domain_file_bytes": self.domain_file_bytes,
            "hosts": len(self.plan.hosts),
            "head": self.plan.head,
            "python": [list(entry) for entry in self.plan.python],
            "nodes": [row.to_dict() for row in self.rows],
            "finetune": finetune,
            "no_finetune": self.no_finetune or None,
        }

    def __str__(self) -> str:
        """The summary, and a table of the nodes, for people."""
        return f"{self.summary}\n\n{self.table}"

    @property
    def table(self) -> str:
        """What every node costs, for people."""
        lines = table([HEADINGS, *[row.cells for row in self.rows]])
        if self.plan.left_to_pytorch:
            lines.append(f"left to PyTorch (more memory): {', '.join(self.plan.left_to_pytorch)}")
        return "\n".join(lines)

    @property
    def summary(self) -> str:
        """What the whole step costs, for people."""
        shapes = ", ".join(" x ".join(map(str, shape)) for shape in self.inputs)
        how = ""
        if self.guessed:
            how = " (guessed; `step_costs(model, batch_size, image_size)` takes others)"
        lines = [self.plan.headline, f"one training step on {shapes}{how}", ""]
        lines += [*table(list(self._summary())), f"peak of DA3 at {where(self.ours)}"]
        if self.budget_bytes is not None:
            kept = len(self.kept), len(self.plan.regions)
            way = how_split(self.parts, self.again, accumulated=self.accumulated, kept=kept)
            lines.append(f"held to {format_bytes(self.budget_bytes)}: {way}")
        if self.finetune is not None:
            lines.append(f"peak of fine-tuning at {where(self.finetune)}")
        if self.no_finetune:
            lines.append(f"fine-tuning is not known: {self.no_finetune}")
        return "\n".join(lines)

    def _summary(self) -> Iterator[tuple[str, ...]]:
        yield ("", "DA3", "fine-tuning", "")
        ours, theirs = _totals(self.ours), {} if self.finetune is None else _totals(self.finetune)
        ours |= {"parameters": self.domain_parameters, "file": self.domain_file_bytes}
        theirs |= {"parameters": self.finetune_parameters, "file": self.finetune_file_bytes}
        for what, key, text in (
            ("kept for the backward", "saved_activation_bytes", format_bytes),
            ("peak above the resting model", "peak_bytes", format_bytes),
            ("FLOPs forward", "flops_forward", format_count),
            ("FLOPs backward", "flops_backward", format_count),
            ("parameters of a domain", "parameters", format_count),
            ("file of a domain", "file", format_bytes),
        ):
            own, other = ours[key], theirs.get(key)
            yield (what, text(own), "-" if other is None else text(other), ratio(other, own))


def _totals(step: StepPrediction) -> dict[str, Any]:
    return {name: getattr(step, name) for name in TOTALS}
