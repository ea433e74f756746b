"""Without a budget, large batches go in microbatches where that costs next to no time."""

import pytest
import torch
from helpers.budgets import Net, Plain, converted, images
from torch import nn

from lightning_da3 import step_costs
from lightning_da3.budget import costs, policy
from lightning_da3.memory import measure_step


@pytest.fixture
def eager(monkeypatch):
    """Every batch is large, and microbatches may take as long as they like."""
    monkeypatch.setattr(policy, "LARGE_BYTES", 1)
    monkeypatch.setattr(costs, "SLOWER", 1e9)


def gradients(model, x):
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad(model(x).square().mean(), trained)


def test_small_batches_go_whole_and_nothing_is_predicted():
    model = converted(Net())
    model(images(8))
    assert model.budget_policy.chosen == []
    assert model.budget_policy.predicted is None


@pytest.mark.usefixtures("eager")
def test_a_large_batch_takes_microbatches_and_gradients_are_the_same():
    model, x = converted(Net()), images(8)
    model.budget_policy.split = None
    got = gradients(model, x)
    ((count, split),) = model.budget_policy.chosen
    assert (count, split.samples, split.again) == (8, 1, 0)  # the lowest peak of all
    whole = converted(Net())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy, "LARGE_BYTES", 2**62)
        want = gradients(whole, x)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("eager")
@pytest.mark.slow
def test_the_peak_is_lower_and_known_before():
    model, x = converted(Plain()), images(8, 128)

    def step():
        model(x).square().mean().backward()
        model.zero_grad()

    gentle = measure_step(step, repeats=0).peak_bytes
    said = model.budget_policy.predicted.peak_bytes
    known = step_costs(model, inputs=x)
    assert known.parts == (1,) * 8
    assert known.ours.peak_bytes == said
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy, "LARGE_BYTES", 2**62)
        assert gentle < 0.7 * measure_step(step, repeats=0).peak_bytes
    assert abs(gentle - said) < 0.1 * said


def test_time_is_what_limits_it(monkeypatch):
    monkeypatch.setattr(policy, "LARGE_BYTES", 1)
    monkeypatch.setattr(costs, "FLOPS_A_PARAMETER", 1e12)
    model = converted(Net())
    model(images(8))
    assert model.budget_policy.chosen == [(8, None)]


class Centred(nn.Module):
    """Takes the mean of the batch away: samples act on each other."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3, 4, 1), nn.Linear(8, 3)

    def forward(self, x):
        y = self.conv(x).mean((2, 3))
        return self.fc(y - y.mean(0))


@pytest.mark.usefixtures("eager")
def test_samples_that_act_on_each_other_stay_together():
    model = converted(Centred())
    model(images(8))
    assert model.budget_policy.chosen == [(8, None)]
