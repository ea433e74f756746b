"""What a plan costs: bytes and FLOPs of every node, and the totals beside those of fine-tuning."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from lightning_da3.budget.microbatches import Microbatches, batch_size
from lightning_da3.budget.policy import Choice, how_split, microbatch_costs, without_budget
from lightning_da3.budget.regions import regions_of
from lightning_da3.errors import ConfigError, DA3Error, InputError
from lightning_da3.formatting import format_bytes, format_count
from lightning_da3.memory import (
    NodeCost,
    StepPrediction,
    StepPredictor,
    fake_mode_of,
    without_values,
)
from lightning_da3.memory.simulated import MakeOptimizer
from lightning_da3.nn.head import classes_of, new_head
from lightning_da3.passes.hosts import INPUTS, OUTPUTS, host_key
from lightning_da3.passes.recompute import PLACE
from lightning_da3.planning.plan import PartPlan, Plan
from lightning_da3.planning.shapes import SIDES, guesses

if TYPE_CHECKING:
    from lightning_da3.model.model import DA3Model

REST = "loss and the rest"


@dataclasses.dataclass(frozen=True)
class Row:
    """One node of a plan, one adapter, or what a region that is computed again keeps.

    Attributes:
        name: Of the node, the host or the region's source; unique in its kind.
        layer: What it calls, for people.
        keeps: ``"nothing"``, ``"bits"``, ``"codes"``, ``"kept"`` or ``"recomputed"``.
        saved_bytes: For the backward pass.
        flops_forward: Of matrix products and convolutions.
        flops_backward: Likewise, what is computed again among them.
        finetune_saved_bytes: What fine-tuning keeps there; None where its layers are not the same.
    """

    name: str
    layer: str
    keeps: str
    saved_bytes: int
    flops_forward: int
    flops_backward: int
    finetune_saved_bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class PlanCosts:
    """What one training step by a plan costs.

    Attributes:
        plan: The plan.
        inputs: Shapes of the network's inputs.
        guessed: These were guessed.
        ours: The step of one domain.
        finetune: The step of the whole network; None if that is not known.
        no_finetune: Why it is not.
        budget_bytes: To which the step is held, or None.
        parts: Samples of each part of the batch, if it is split to stay within that.
        again: So many of the parts are computed again in the backward.
        accumulated: The parts are training steps whose gradients add up, not pieces of one.
        kept: Modules of regions_of that keep what they could compute again, as there is room.
        rows: Node by node, adapters and computed regions_of where data meets them.
        domain_parameters: Numbers that one domain learns.
        domain_file_bytes: Size of its file.
        finetune_parameters: Of the network.
        finetune_file_bytes: Of the tensors of its state.
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
            "nodes": [_row_dict(row) for row in self.rows],
            "finetune": finetune,
            "no_finetune": self.no_finetune or None,
        }

    def __str__(self) -> str:
        """A table for people."""
        shapes = ", ".join(" x ".join(map(str, shape)) for shape in self.inputs)
        how = " (guessed; `plan.at(batch_size, image_size)` takes others)" if self.guessed else ""
        lines = [self.plan.headline, f"one training step on {shapes}{how}", ""]
        lines += _table([_HEADINGS, *[_cells(row) for row in self.rows]])
        if self.plan.left_to_pytorch:
            lines.append(f"left to PyTorch (more memory): {', '.join(self.plan.left_to_pytorch)}")
        lines += ["", *_table(list(self._summary())), f"peak of DA3 at {_where(self.ours)}"]
        if self.budget_bytes is not None:
            kept = len(self.kept), len(self.plan.regions)
            way = how_split(self.parts, self.again, accumulated=self.accumulated, kept=kept)
            lines.append(f"held to {format_bytes(self.budget_bytes)}: {way}")
        if self.finetune is not None:
            lines.append(f"peak of fine-tuning at {_where(self.finetune)}")
        if self.no_finetune:
            lines.append(f"fine-tuning is not known: {self.no_finetune}")
        return "\n".join(lines)

    def _summary(self) -> Iterator[tuple[str, ...]]:
        ours, theirs = self.ours, self.finetune
        yield ("", "DA3", "fine-tuning", "")
        pairs = [
            ("kept for the backward", "saved_activation_bytes", format_bytes),
            ("peak above the resting model", "peak_bytes", format_bytes),
            ("FLOPs forward", "flops_forward", format_count),
            ("FLOPs backward", "flops_backward", format_count),
        ]
        for what, field, text in pairs:
            own = getattr(ours, field)
            other = None if theirs is None else getattr(theirs, field)
            yield (what, text(own), "-" if other is None else text(other), _ratio(other, own))
        for what, text, own, other in (
            (
                "parameters of a domain",
                format_count,
                self.domain_parameters,
                self.finetune_parameters,
            ),
            ("file of a domain", format_bytes, self.domain_file_bytes, self.finetune_file_bytes),
        ):
            yield (what, text(own), "-" if other is None else text(other), _ratio(other, own))


@dataclasses.dataclass(frozen=True)
class ModelPlan(Plan):
    """The plan of a converted network, which knows what its training steps cost.

    Printed, it says so for one sample of a guessed size; `at` for others.
    """

    model: DA3Model | None = dataclasses.field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, plan: Plan, model: DA3Model) -> ModelPlan:
        """`plan`, of `model`."""
        fields = {f.name: getattr(plan, f.name) for f in dataclasses.fields(plan)}
        return cls(**fields, model=model)

    def __reduce__(self) -> tuple[Any, ...]:
        """Saved, it is the plan alone."""
        return Plan, tuple(getattr(self, f.name) for f in dataclasses.fields(Plan))

    def at(
        self,
        batch_size: int = 1,
        image_size: int | Sequence[int] | None = None,
        *,
        inputs: Any = None,
        optimizer: MakeOptimizer | None = None,
    ) -> PlanCosts:
        """What a training step costs, held to the model's budget if it has one.

        Of the active domain; if none is, of one with as many classes as the network has. Node by
        node it is the step on the whole batch.

        Args:
            batch_size: Samples of the batch.
            image_size: Of every spatial axis, or of each; guessed if left out.
            inputs: Instead of both, a tensor or a tuple of the network's arguments, of which only
                shapes, types and strides matter.
            optimizer: As of `StepPredictor`: plain SGD if left out.

        Raises:
            ConfigError: A size is not positive, or the network has no images to have a size.
            InputError: The network does not take such inputs.
            ConfigError: The budget cannot be held.
            DA3Error: What it takes is not known, or it decides by values of its tensors.
        """
        assert self.model is not None
        return _costs(self, self.model, batch_size, image_size, inputs, optimizer)

    def __str__(self) -> str:
        """A table for people."""
        try:
            return str(self.at())
        except DA3Error as error:
            return f"{super().__str__()}\nbytes are not known: {error}"


class Original:
    """The user's network without values, and so nearly without memory; no copy, no file holds it.

    Args:
        network: Left unchanged; None: none.

    Raises:
        DA3Error: It cannot be copied.
    """

    def __init__(self, network: nn.Module | None = None) -> None:
        self.network: nn.Module | None = None
        if network is not None:
            copied = StepPredictor(network).twin
            self.network = copied.requires_grad_(True) if _can_train(copied) else copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Original:
        del memo
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Original, ()


def _can_train(network: nn.Module) -> bool:
    return all(p.is_floating_point() or p.is_complex() for p in network.parameters())


# --- the steps ------------------------------------------------------------------------------------


def _costs(
    plan: ModelPlan,
    model: DA3Model,
    batch_size: int,
    image_size: int | Sequence[int] | None,
    inputs: Any,
    optimizer: MakeOptimizer | None,
) -> PlanCosts:
    predictor = StepPredictor(model, optimizer=optimizer, prepare=_alone, name=plan.network)
    twin: Any = predictor.twin
    guessed = inputs is None and image_size is None
    last: DA3Error | None = None
    for given in _inputs(plan, twin, batch_size, image_size, inputs):
        try:
            ours = predictor(*given)
        except InputError as error:
            last = error
            continue
        name = twin.active_domain
        theirs, network, why = _fine_tuning(plan, model, twin, given, optimizer)
        domain = twin.domain(name)
        whole = ours
        held: dict[str, Any] = {}
        if model.budget_policy.budget is not None:
            ours, held = _held(model, predictor, given)
        kept = held.get("kept", ())
        return PlanCosts(
            plan,
            tuple(tuple(x.shape) for x in tree_leaves(given) if isinstance(x, Tensor)),
            guessed,
            ours,
            theirs,
            tuple(_rows(plan, ours if kept else whole, theirs, kept)),
            sum(p.numel() for p in domain.parameters()),
            twin.domain_file_bytes(name),
            None if network is None else sum(p.numel() for p in network.parameters()),
            None
            if network is None
            else sum(t.numel() * t.itemsize for t in network.state_dict().values()),
            why,
            **held,
        )
    if last is not None:
        raise last
    raise DA3Error(
        f"What {plan.network} takes is not known. Give it: `model.plan.at(inputs=(x, y))`; tensors "
        "of the meta device will do."
    )


def _held(
    model: DA3Model, predictor: StepPredictor, given: tuple[Any, ...]
) -> tuple[StepPrediction, dict[str, Any]]:
    """The step within the budget, and how it stays there."""
    count = batch_size(given, {})
    if count is None:
        raise ConfigError(
            f"What {model.plan.network} does within a budget is known only of inputs with samples "
            "along axis 0."
        )
    costs = microbatch_costs(predictor, given, {})
    most = model.budget_policy.bytes_on(next(model.parameters()).device)
    if model.budget_policy.by == "accumulate":
        parts = Microbatches(costs.largest(most)).counts(count)
        choice = Choice(None, costs.accumulated(max(parts)), tuple(parts))
    else:
        choice = costs.hold(given, {}, most)
    return choice.step, {
        "budget_bytes": most,
        "parts": choice.parts if len(choice.parts) > 1 else (),
        "again": choice.again,
        "accumulated": model.budget_policy.by == "accumulate",
        "kept": choice.kept,
    }


def _alone(model: Any) -> None:
    without_budget(model)
    _with_domain(model)


def _with_domain(model: Any) -> None:
    """Let some domain train."""
    if model.active_domain is not None:
        return
    head = model.plan.head
    name = "domain"
    while name in model.domains:
        name += "_"
    slot = None if head is None else model.backbone.get_submodule(head)
    mode = fake_mode_of(model)
    with torch.random.fork_rng(devices=[]):  # whoever trains draws the same numbers as without
        model.add_domain(name, None if slot is None else classes_of(slot.original))
    if mode is not None:
        model.bank[name] = without_values(model.bank[name], mode)
    model.set_domain(name)


def _fine_tuning(
    plan: Plan,
    model: DA3Model,
    twin: Any,
    inputs: tuple[Any, ...],
    optimizer: MakeOptimizer | None,
) -> tuple[StepPrediction | None, nn.Module | None, str]:
    network = None if model.original is None else model.original.network
    if network is None:
        return None, None, "a model that was saved forgets the network it was made from"
    predictor = StepPredictor(network, optimizer=optimizer)
    head = twin.domain(twin.active_domain).head
    if head is not None and plan.head is not None:
        own: Any = predictor.twin.get_submodule(plan.head)
        with fake_mode_of(network) or torch.device("cpu"):
            predictor.twin.set_submodule(
                plan.head, new_head(own, classes_of(head), own.weight.device)
            )
    try:
        return predictor(*inputs), predictor.twin, ""
    except DA3Error as error:  # in train mode some networks need more samples
        return None, predictor.twin, str(error)


def _inputs(
    plan: Plan,
    model: DA3Model,
    batch_size: int,
    image_size: int | Sequence[int] | None,
    inputs: Any,
) -> Iterator[tuple[Any, ...]]:
    """What to try, most likely first."""
    if inputs is not None:
        yield inputs if isinstance(inputs, tuple) else (inputs,)
        return
    sides = [image_size] if isinstance(image_size, int) else list(image_size or ())
    if not isinstance(batch_size, int) or batch_size < 1 or any(side < 1 for side in sides):
        raise ConfigError(
            f"`batch_size` and `image_size` must be at least 1, got {batch_size} and {image_size}."
        )
    dtype = model.dtype
    if plan.input_channels is not None:
        axes, channels = plan.input_channels
        if image_size is not None and len(sides) not in (1, axes):
            raise ConfigError(
                f"`image_size` must be one number or {axes}, as {plan.network} has so many spatial "
                f"axes, got {image_size}."
            )
        own = getattr(model.backbone, "image_size", None)
        guess = [(own,) * axes] if isinstance(own, int) else []
        sizes = [tuple(sides) * (axes // len(sides))] if sides else [*guess, *SIDES[axes]]
        for size in sizes:
            yield (torch.empty(batch_size, channels, *size, dtype=dtype, device="meta"),)
        return
    if image_size is not None:
        raise ConfigError(
            f"`image_size` makes no sense for {plan.network}, whose first layer is no convolution "
            "of its input. Leave it out, or give `inputs`."
        )
    if isinstance(model.backbone, fx.GraphModule):
        for sample in guesses(model.backbone):
            yield tuple(x.new_empty(batch_size, *x.shape[1:]) for x in sample)


# --- rows -----------------------------------------------------------------------------------------


def _rows(
    plan: Plan, ours: StepPrediction, theirs: StepPrediction | None, kept: Sequence[str]
) -> Iterator[Row]:
    own = [node for region in regions_of(plan) if region.name in kept for node in region.nodes]
    costs = {cost.name: cost for cost in ours.nodes}
    tuned = {} if theirs is None else {_flat(n.name): n.saved_bytes for n in theirs.nodes if n.name}
    for part in plan.parts:
        other_costs = tuned if theirs is not None else None
        yield from _part_rows(part, costs, other_costs, frozenset(own))
    rest = _total(costs.values())
    other = None if theirs is None else sum(tuned.values()) + _unnamed(theirs)
    if any((*rest, other)):
        yield Row(REST, "", "kept" if rest[0] else "nothing", *rest, other)


def _part_rows(
    part: PartPlan,
    costs: dict[str, NodeCost],
    tuned: dict[str, int] | None,
    kept: frozenset[str],
) -> Iterator[Row]:
    """Takes what it lists out of `costs` and `tuned`; `kept`: nodes not computed again."""
    prefix = part.prefix

    def taken(*names: str) -> tuple[int, int, int]:
        return _total([costs.pop(name) for name in names if name in costs])

    adapters = {host.readers[0]: host for host in part.hosts}
    bits: dict[str | None, int] = {}  # kept by what an activation became one operation with
    with_bits = {node.fold_into for node in part.nodes if node.action == "fuse"}
    starts = {region.nodes[0]: i for i, region in enumerate(part.regions)}
    for node in part.nodes:
        if node.name in starts:
            i = starts[node.name]
            source = part.regions[i].source
            name = f"{part.path}.{source}" if part.path else source
            found = taken(f"{prefix}{PLACE}_{i}".replace(".", "_", 0))
            yield Row(name, "read again", "codes" if found[0] else "nothing", *found)
        if node.name in adapters:
            host = adapters[node.name]
            doors = [f"{prefix}{d}_{_flat(host_key(host.name), 0)}" for d in (INPUTS, OUTPUTS)]
            found = taken(*[name for name in costs if name in doors])
            yield Row(host.name, "adapter", "codes" if found[0] else "nothing", *found)
        layer = part.path if part.path and node.name == "layer" else node.name
        mine = None if tuned is None else tuned.pop(_flat(f"{part.path}.{layer}"), 0)
        if mine == 0 and tuned is not None:
            mine = tuned.pop(_flat(layer), 0)
        name = f"{part.path}.{node.name}" if part.path else node.name
        cost = taken(prefix + node.name)
        if node.action == "fuse":
            cost = (bits.pop(node.fold_into, 0), 0, 0)
        elif node.name in with_bits:  # the convolution itself keeps nothing
            bits[node.name], cost = cost[0], (0, *cost[1:])
        keeps = node.keeps
        if prefix + node.name in kept and keeps == "recomputed":
            keeps = "kept" if cost[0] else "nothing"
        yield Row(name, node.layer, keeps, *cost, mine)


def _flat(name: str, least: int = 1) -> str:
    """Dotted names and names of nodes become alike."""
    joined = re.sub(r"[^0-9A-Za-z_]", "_", name)
    return re.sub("_+", "_", joined).strip("_") if least else joined


def _total(costs: Any) -> tuple[int, int, int]:
    costs = list(costs)
    return (
        sum(c.saved_bytes for c in costs),
        sum(c.flops_forward for c in costs),
        sum(c.flops_backward for c in costs),
    )


def _unnamed(step: StepPrediction) -> int:
    return sum(node.saved_bytes for node in step.nodes if not node.name)


# --- text -----------------------------------------------------------------------------------------

_HEADINGS = ("node", "layer", "keeps", "bytes", "fine-tuning", "FLOPs forward", "backward")


def _cells(row: Row) -> tuple[str, ...]:
    tuned = row.finetune_saved_bytes
    return (
        row.name,
        row.layer,
        row.keeps,
        format_bytes(row.saved_bytes) if row.saved_bytes else "",
        format_bytes(tuned) if tuned else "",
        format_count(row.flops_forward) if row.flops_forward else "",
        format_count(row.flops_backward) if row.flops_backward else "",
    )


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows of one length; what begins with a digit stands to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = [
        any(cell[:1].isdigit() for cell in column[1:]) and i > 0
        for i, column in enumerate(zip(*rows, strict=True))
    ]
    return [
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in rows
    ]


def _ratio(before: float | None, after: float) -> str:
    return f"{before / after:.1f}x" if before and after else ""


def _where(step: StepPrediction) -> str:
    name = step.peak_node.removeprefix("backbone.")
    return f"{name or 'the loss'}, {step.peak_phase}"


def _totals(step: StepPrediction) -> dict[str, Any]:
    fields = (
        "saved_activation_bytes",
        "peak_bytes",
        "peak_node",
        "peak_phase",
        "flops_forward",
        "flops_backward",
    )
    return {name: getattr(step, name) for name in fields}


def _row_dict(row: Row) -> Mapping[str, Any]:
    return {
        "name": row.name,
        "layer": row.layer,
        "keeps": row.keeps,
        "saved_activation_bytes": row.saved_bytes,
        "flops_forward": row.flops_forward,
        "flops_backward": row.flops_backward,
        "finetune_saved_activation_bytes": row.finetune_saved_bytes,
    }
