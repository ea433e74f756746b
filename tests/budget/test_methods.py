"""A budget holds for calls of the network's other methods, too."""

import warnings

import pytest
import torch
from helpers.budgets import Net, converted, images
from helpers.comparing import assert_relatively_close

from lightning_da3 import MemoryConfig, PredictionWarning
from lightning_da3.budget.microbatches import Microbatches


class Encoder(Net):
    def encode(self, x, scale=1.0):
        return {"features": self.forward(x) * scale}

    def doubled(self, x):  # before the first host
        return x * 2.0

    def by_value(self, x):
        y = self.forward(x)
        return y if float(y.detach().sum()) < 1e9 else -y


def gradients(model, loss):
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad(loss, trained, allow_unused=True)


def losses(model, x, **kwargs):
    return model.encode(x, **kwargs)["features"].square().mean()


def test_a_method_goes_in_pieces_with_the_gradients_of_the_whole():
    model, x = converted(Encoder()), images()
    expected = gradients(model, losses(model, x, scale=0.5))
    model.budget_policy.split = Microbatches(2)
    assert_relatively_close(gradients(model, losses(model, x, scale=0.5)), expected, 1e-3)


def test_a_budget_splits_a_method_as_it_would_split_forward():
    model, x = converted(Encoder()), images()
    whole = model.budget_policy.costs_of(model, (x,), {}).whole((x,), {}).step.peak_bytes
    model.budget_policy.hold(MemoryConfig(budget=int(whole * 0.8)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses(model, x)
        assert model.doubled(x).shape == x.shape  # trains nothing
    ((count, split),) = model.budget_policy.chosen
    assert (count, split is None) == (len(x), False)
    assert split.samples < count


def test_what_cannot_be_predicted_goes_whole_and_says_so():
    model, x = converted(Encoder()), images()
    model.budget_policy.hold(MemoryConfig(budget="1GiB"))
    with pytest.warns(PredictionWarning, match="does not count calls of by_value"):
        model.by_value(x)


@pytest.mark.filterwarnings("error")
def test_what_trains_nothing_does_not_decide_how_steps_are_split():
    model, x = converted(Encoder()), images()
    model.budget_policy.hold(MemoryConfig(budget="1GiB", split="accumulate"))
    losses(model, x)
    model.doubled(x)
    model.budget_policy.remember_part("images")
    assert model.budget_policy.part_of("images") >= len(x)
