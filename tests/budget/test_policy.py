"""Training steps held to a budget."""

import copy
import dataclasses
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers.budgets import KIB, Mlp, Net, Plain, Regions, converted, costs_of, gradients, images
from helpers.comparing import assert_relatively_close
from helpers.marks import others_by_hand
from torch import nn

from lightning_da3 import (
    ConfigError,
    DA3Config,
    MemoryConfig,
    step_costs,
)
from lightning_da3.budget.costs import MARGIN, microbatch_costs
from lightning_da3.budget.microbatches import Microbatches
from lightning_da3.budget.policy import Recent, without_budget
from lightning_da3.budget.regions import most_kept, regions_of
from lightning_da3.formatting import format_bytes
from lightning_da3.memory import (
    StepPredictor,
    measure_step,
    saved_activation_bytes,
)
from lightning_da3.nn.recomputed import Recomputed


class Tokens(nn.Module):
    """Five residual branches, each of which can be computed again."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, 4)
        self.blocks = nn.Sequential(*[Mlp(32) for _ in range(5)])
        self.fc = nn.Linear(32, 5)

    def forward(self, x):
        return self.fc(self.blocks(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("kib", [6000, 4000, 2500])
def test_a_step_stays_within_its_budget(exact, kib):
    model, x = converted(Plain(), exact=exact), images(16, 128)
    labels = torch.zeros(16, dtype=torch.long)

    def peak():
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)

        def step():
            F.cross_entropy(model(x), labels).backward()
            optimizer.step()
            optimizer.zero_grad()

        return measure_step(step, repeats=0).peak_bytes

    assert peak() > kib * KIB
    model.budget_policy.hold(MemoryConfig(budget=f"{kib} KiB"))
    assert peak() <= kib * KIB
    ((count, split),) = model.budget_policy.chosen
    assert count == 16
    assert split is not None


@pytest.mark.parametrize(
    "split",
    [Microbatches(8), Microbatches(5), Microbatches(3, 2), Microbatches(1, 9), Microbatches(4, 3)],
)
@pytest.mark.parametrize("network", [Net, Regions])
@pytest.mark.slow
def test_predictions_are_those_of_a_step_in_pieces(network, split):
    model, x = converted(network()), images(16, 64)
    kwargs = {} if network is Net else {"scale": torch.ones(16)}
    predictor = StepPredictor(model, prepare=without_budget)
    costs = microbatch_costs(predictor, (x,), kwargs)
    said = costs.step(16, split)
    predictor.twin.budget_policy.split = split
    found = predictor(x, **kwargs)
    assert abs(said.peak_bytes / found.peak_bytes - 1) <= 0.1
    assert abs(said.saved_activation_bytes / found.saved_activation_bytes - 1) <= 0.02
    assert abs(said.flops_backward / found.flops_backward - 1) <= 0.01


def test_the_least_extra_time_is_chosen():
    model, x = converted(Net()), images(16, 64)
    costs = model.budget_policy.costs_of(model, (x,), {})
    whole = costs.peak(16, None).bytes
    assert costs.choose(16, round(whole * MARGIN) + 1) is None
    chosen = [costs.choose(16, whole * part // 100) for part in (99, 60, 30, 20)]
    extra = [costs.extra_flops(16, split) for split in chosen]
    assert extra == sorted(extra)
    assert chosen[0] == Microbatches(8)
    for part, split in zip((99, 60, 30, 20), chosen, strict=True):
        assert MARGIN * costs.peak(16, split).bytes <= whole * part / 100


@pytest.mark.parametrize("exact", others_by_hand([False, True], True))
def test_where_a_budget_has_room_more_is_kept_and_less_computed_twice(exact):
    model, x = converted(Tokens(), exact=exact), images(16, 64)
    model(x)
    least = StepPredictor(model, prepare=without_budget)(x)
    kept, flops = [least.saved_activation_bytes], [least.flops_backward]
    for part in (1.15, 1.5, 100.0):
        budget = round(MARGIN * least.peak_bytes * part)
        said, saved, peak = costs_of(model, x, budget)
        assert said.saved_activation_bytes == pytest.approx(saved, rel=1e-3)  # the loss apart
        assert peak <= budget
        kept.append(said.saved_activation_bytes)
        flops.append(said.flops_backward)
    assert kept == sorted(kept)
    assert kept[-1] > 1.2 * kept[0]
    assert flops == sorted(flops, reverse=True)
    assert flops[-1] < flops[0]
    model.budget_policy.hold(MemoryConfig())
    assert saved_activation_bytes(model, x) == pytest.approx(kept[0], rel=2e-3)  # as before


@pytest.mark.exhaustive
def test_what_is_kept_comes_in_the_order_of_flops_for_a_byte():
    model, x = converted(Tokens()), images(16, 64)
    predictor = StepPredictor(model, prepare=without_budget)
    least, every = (most_kept(predictor, (x,), {}, bound) for bound in (0, 1e12))
    assert least[0] == ()
    assert set(every[0]) == {region.name for region in regions_of(model.plan)}
    low, high = least[1].peak_bytes, every[1].peak_bytes
    bounds = [low + (high - low) * part // 4 for part in (1, 2, 3)]
    found = [most_kept(predictor, (x,), {}, bound)[0] for bound in bounds]
    assert len(set(found)) > 1
    for fewer, more in itertools.pairwise(found):
        assert more[: len(fewer)] == fewer


@pytest.mark.slow
def test_what_is_kept_changes_no_exact_gradient():
    model = converted(Tokens(), exact=True).double()
    x = images(4, dtype=torch.float64)
    output, expected = gradients(model, x, None)
    model.budget_policy.hold(MemoryConfig(exact=True, budget="1GiB"))
    same, found = gradients(model, x, None)

    def stretches_of(model):
        return [m for m in model.modules() if isinstance(m, Recomputed)]

    assert any(module.kept for module in stretches_of(model))
    assert not any(module.kept for module in stretches_of(copy.deepcopy(model)))
    assert_relatively_close([same], [output], 1e-12)
    assert_relatively_close(found, expected, 1e-12)


def test_a_plan_names_what_is_kept():
    model = converted(Tokens(), budget="1GiB")
    costs = step_costs(model, 4, 64)
    regions = len(model.plan.regions)
    assert f"and room to keep {regions} of {regions} regions" in str(costs)
    assert len(costs.to_dict()["kept"]) == regions
    assert not [row for row in costs.rows if row.keeps == "recomputed"]
    assert costs.ours.saved_activation_bytes == sum(row.saved_bytes for row in costs.rows)


def test_an_impossible_budget_names_the_least_and_what_dominates_it():
    model, x = converted(Net(), budget="20KiB"), images(4, 64)
    with pytest.raises(ConfigError) as caught:
        model(x)
    least = model.budget_policy.costs_of(model, (x,), {}).peak(4, Microbatches(1, 3))
    assert f"smallest is {format_bytes(MARGIN * least.bytes)}" in str(caught.value)
    assert least.node.removeprefix("backbone.") in str(caught.value)
    model.budget_policy.hold(MemoryConfig(budget=round(MARGIN * least.bytes) + 1))
    model(x).sum().backward()
    assert model.budget_policy.chosen == [(4, Microbatches(1, 3))]


def test_budgets_matter_only_while_training():
    model = converted(Net(), budget="20KiB")
    with torch.no_grad():
        model(images(4, 64))
    model.set_domain(None)
    model(images(4, 64))


@pytest.mark.slow
def test_copies_and_pickles_keep_the_budget():
    model = converted(Plain(), budget="500KiB")
    model(images(16, 64))
    assert model.budget_policy.chosen
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.budget_policy.budget == "500KiB"
        assert not other.budget_policy.chosen
        other(images(16, 64))
        assert other.budget_policy.chosen == model.budget_policy.chosen


def test_what_the_device_has_free():
    model = converted(Net(), budget="auto")
    assert 2**20 < model.budget_policy.bytes_on(torch.device("cpu")) < 2**50
    with pytest.raises(ConfigError, match="is not known here"):
        model.budget_policy.bytes_on(torch.device("meta"))


def test_budgets_are_about_machines():
    budget = DA3Config(memory=MemoryConfig(budget="1.5 MiB"))
    assert budget == DA3Config()
    assert budget.to_dict() == DA3Config().to_dict()
    assert DA3Config.from_dict({"memory": {"budget": 5}}).memory.budget == 5
    for wrong in ("5 parrots", "-1MiB", 0, -5, 1.5, True, "128", ""):
        with pytest.raises(ConfigError, match="`budget` must be bytes"):
            MemoryConfig(budget=wrong)
    with pytest.raises(ConfigError, match="`split` must be 'pieces' or 'accumulate'"):
        MemoryConfig(split="halves")
    assert dataclasses.replace(budget.memory, exact=True).budget == "1.5 MiB"


@pytest.mark.slow
def test_a_policy_remembers_the_latest_kinds_of_batches_alone():
    model = converted(Net(), budget="1GiB")
    policy = model.budget_policy
    policy._costs.most, policy._chosen.most = 2, 3
    for side in (8, 12, 16, 20, 16):
        model(images(2, side))
    assert len(policy._costs.entries) == 2
    assert [key[-1] for key in policy._chosen.entries] == [2, 2, 2]
    latest = policy._chosen.entries
    model(images(2, 16))
    assert list(policy._chosen.entries) == list(latest)  # which is not decided again


def test_what_was_not_asked_for_longest_is_forgotten():
    recent, made = Recent(2), []
    for key in "abacab":
        recent.get(key, lambda key=key: made.append(key))
    assert "".join(made) == "abcb"
    with pytest.raises(ZeroDivisionError):
        recent.get("d", lambda: 1 / 0)
    assert list(recent.entries) == ["a", "b"]
