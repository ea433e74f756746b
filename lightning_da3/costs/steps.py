"""`step_costs`: what a training step of a model costs, known before it runs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_da3.budget.costs import Choice, microbatch_costs
from lightning_da3.budget.microbatches import Microbatches
from lightning_da3.budget.microbatches import batch_size as samples_of
from lightning_da3.budget.policy import goes_in_microbatches, without_budget
from lightning_da3.costs.inputs import inputs_for
from lightning_da3.costs.report import StepCosts
from lightning_da3.costs.rows import rows_of
from lightning_da3.errors import ConfigError, DA3Error, InputError
from lightning_da3.memory import StepPrediction, StepPredictor, fake_mode_of, without_values
from lightning_da3.memory.simulated import MakeOptimizer
from lightning_da3.model.domain import Domain
from lightning_da3.model.model import DA3Model
from lightning_da3.nn.head import Head, classes_of, new_head
from lightning_da3.torch_private.trees import tree_leaves

Arguments = tuple[Any, ...]


def step_costs(
    model: DA3Model,
    batch_size: int = 1,
    image_size: int | Sequence[int] | None = None,
    *,
    inputs: Any = None,
    optimizer: MakeOptimizer | None = None,
    num_classes: int | None = None,
) -> StepCosts:
    """What a training step of a converted network costs, held to its budget if it has one.

    The step runs on tensors without values: it takes seconds at most, next to no memory, and
    changes nothing. It is of the active domain; if none is, of one with as many classes as the
    network has. Node by node it is the step on the whole batch.

    Args:
        model: The converted network.
        batch_size: The number of samples of the batch.
        image_size: The size of every spatial axis, or of each; guessed if left out.
        inputs: Instead of both, a tensor or a tuple of the network's arguments, of which only
            shapes, types and strides matter.
        optimizer: Makes the optimizer from parameters; plain SGD if left out.
        num_classes: The number of classes of the domain, if none is active.

    Returns:
        The costs, beside those of fine-tuning. ``print(step_costs(model))`` shows them.

    Raises:
        ConfigError: `model` is not converted, a size is not positive, the network has no images to
            have a size, or the budget cannot be held.
        InputError: The network does not take such inputs.
        DA3Error: What it takes is not known, or it decides by values of its tensors.
    """
    if not isinstance(model, DA3Model):
        raise ConfigError(
            f"`model` must be a DA3Model, as `convert(network)` gives it, got "
            f"{type(model).__name__}."
        )
    prepare = partial(_alone, num_classes=num_classes)
    predictor = StepPredictor(model, optimizer=optimizer, prepare=prepare, name=model.plan.network)
    twin = cast(DA3Model, predictor.twin)
    if inputs is not None:
        given = inputs if isinstance(inputs, tuple) else (inputs,)
        whole = predictor(*given)
    else:
        given, whole = _first_that_fits(predictor, twin, batch_size, image_size)
    ours, held = _held(model, predictor, given, whole)
    domain = twin.domain(cast(str, twin.active_domain))
    finetune, network, why = _fine_tuning(model, domain, given, optimizer)
    kept = held.get("kept", ())
    plan = twin.plan
    rows = rows_of(plan, ours if kept else whole, finetune, kept, exact=model.config.memory.exact)
    return StepCosts(
        plan=plan,
        inputs=tuple(tuple(x.shape) for x in tree_leaves(given) if isinstance(x, Tensor)),
        guessed=inputs is None and image_size is None,
        ours=ours,
        finetune=finetune,
        rows=tuple(rows),
        domain_parameters=sum(p.numel() for p in domain.parameters()),
        domain_file_bytes=twin.domain_file_bytes(cast(str, twin.active_domain)),
        no_finetune=why,
        **_sizes_of(network),
        **held,
    )


def _first_that_fits(
    predictor: StepPredictor,
    twin: DA3Model,
    batch_size: int,
    image_size: int | Sequence[int] | None,
) -> tuple[Arguments, StepPrediction]:
    """The first of the likely inputs that the network takes, and the step on it."""
    last: DA3Error | None = None
    for given in inputs_for(twin, batch_size, image_size):
        try:
            return given, predictor(*given)
        except InputError as error:  # noqa: PERF203 - each is a guess
            last = error
    raise last or DA3Error(
        f"What {twin.plan.network} takes is not known. Give it: "
        "`step_costs(model, inputs=(x, y))`; tensors of the meta device will do."
    )


def _held(
    model: DA3Model, predictor: StepPredictor, given: Arguments, whole: StepPrediction
) -> tuple[StepPrediction, dict[str, Any]]:
    """The step within the budget, and how it stays there."""
    policy, count = model.budget_policy, samples_of(given, {})
    if policy.budget is None:
        return _gentle(model, predictor, given, whole)
    if count is None:
        raise ConfigError(
            f"What {model.plan.network} does within a budget is known only of inputs with samples "
            "along axis 0."
        )
    costs, accumulated = microbatch_costs(predictor, given, {}), policy.by == "accumulate"
    most = policy.bytes_on(next(model.parameters()).device)
    if accumulated:
        parts = Microbatches(costs.largest(most)).counts(count)
        choice = Choice(None, costs.accumulated(max(parts)), tuple(parts))
    else:
        choice = costs.hold(given, {}, most)
    return costs.over_time(choice), {
        "budget_bytes": most,
        "parts": choice.parts if len(choice.parts) > 1 else (),
        "again": choice.again,
        "accumulated": accumulated,
        "kept": choice.kept,
    }


def _gentle(
    model: DA3Model, predictor: StepPredictor, given: Arguments, whole: StepPrediction
) -> tuple[StepPrediction, dict[str, Any]]:
    """The step without a budget, in microbatches where the model would take them."""
    device = next(model.parameters()).device
    if not goes_in_microbatches(model, given, device):
        return whole, {}
    costs = microbatch_costs(predictor, given, {})
    choice = costs.lowest_peak(given, {})
    return costs.over_time(choice), {"parts": choice.parts if len(choice.parts) > 1 else ()}


def _alone(model: DA3Model, num_classes: int | None = None) -> None:
    """Let some domain train, on whole batches."""
    without_budget(model)
    if model.active_domain is not None:
        if num_classes is not None:
            raise ConfigError(
                f"`num_classes` is {num_classes!r}, but the domain {model.active_domain!r} is "
                "active, which has its own. Leave it out, or call `set_domain(None)` first."
            )
        return
    name = "domain"
    while name in model.domains:
        name += "_"
    slot = None if model.plan.head is None else model.backbone.get_submodule(model.plan.head)
    classes = None if slot is None else classes_of(cast(nn.Module, slot.original))
    classes = classes if num_classes is None else num_classes
    mode = fake_mode_of(model)
    with torch.random.fork_rng(devices=[]):  # whoever trains draws the same numbers as without
        model.add_domain(name, classes)
    if mode is not None:
        model.bank[name] = without_values(model.domain(name), mode)
    model.set_domain(name)


# --- fine-tuning ----------------------------------------------------------------------------------


def _fine_tuning(
    model: DA3Model, domain: Domain, inputs: Arguments, optimizer: MakeOptimizer | None
) -> tuple[StepPrediction | None, nn.Module | None, str]:
    """The step of the whole network, that network, and why the step is not known."""
    network = model.original.network
    if network is None:
        return None, None, "a model that was saved forgets the network it was made from"
    predictor = StepPredictor(network, optimizer=optimizer)
    if domain.head is not None and model.plan.head is not None:
        own = cast(Head, predictor.twin.get_submodule(model.plan.head))
        with fake_mode_of(network) or torch.device("cpu"):
            head = new_head(own, classes_of(domain.head), own.weight.device, exact=True)
        predictor.twin.set_submodule(model.plan.head, head)
    try:
        return predictor(*inputs), predictor.twin, ""
    except DA3Error as error:  # in train mode some networks need more samples
        return None, predictor.twin, str(error)


def _sizes_of(network: nn.Module | None) -> dict[str, Any]:
    if network is None:
        return {}
    return {
        "finetune_parameters": sum(p.numel() for p in network.parameters()),
        "finetune_file_bytes": sum(t.numel() * t.itemsize for t in network.state_dict().values()),
    }
