"""Training steps on parts of a batch, whose gradients add up."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from helpers.budgets import KIB, Net, Plain, converted, images
from helpers.comparing import assert_relatively_close, mix_gates_
from torch import nn

from lightning_da3 import (
    ConfigError,
    DA3Error,
    InputError,
    MemoryConfig,
    accumulated,
)
from lightning_da3.budget.costs import MARGIN
from lightning_da3.budget.microbatches import Microbatches
from lightning_da3.memory import (
    measure_step,
)


def loss_of(model, part):
    return F.cross_entropy(model(part[0]), part[1])


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_accumulated_gradients_are_those_of_the_whole_batch(parts):
    model = converted(Net(), split="accumulate").double()
    model.config = dataclasses.replace(model.config, gate=None)  # whose budget is every part's own
    x, labels = images(5, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    trained = [p for p in model.parameters() if p.requires_grad]
    whole = loss_of(model, (x, labels))
    expected = torch.autograd.grad(whole, trained)
    model.budget_policy.split = Microbatches(parts)
    sizes = []

    def step(part):
        sizes.append(len(part[0]))
        return {"loss": loss_of(model, part), "size": len(part[0])}

    output = accumulated(model, step, (x, labels), scale=4.0)
    assert_relatively_close([output["loss"]], [whole], 1e-12)
    found = torch.autograd.grad(3.0 * output["loss"], trained)
    assert_relatively_close(found, [3.0 * g for g in expected], 1e-12)
    assert sum(sizes) == 5
    assert max(sizes) == min(parts, 2)  # the first of a new kind is one sample
    assert output["size"] == sizes[-1]


@pytest.mark.slow
def test_accumulating_keeps_one_part_and_holds_the_budget():
    model, x = converted(Plain(), split="accumulate"), images(16, 128)
    batch = (x, torch.zeros(16, dtype=torch.long))

    def step():
        accumulated(model, lambda part: loss_of(model, part), batch).backward()
        model.zero_grad()

    model.budget_policy.split = Microbatches(16)
    assert measure_step(step, repeats=0).peak_bytes > 2000 * KIB
    model.budget_policy.hold(MemoryConfig(budget="2000KiB", split="accumulate"))
    assert measure_step(step, repeats=0).peak_bytes <= 2000 * KIB
    costs = model.budget_policy.costs_of(model, (x,), {})
    largest = costs.largest(2000 * KIB)
    assert 1 < largest < 16
    assert costs.accumulated(largest + 1).peak_bytes * MARGIN > 2000 * KIB


def test_the_gates_budget_is_that_of_every_part():
    model = converted(Net(), split="accumulate").double()
    x, labels = images(4, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    mix_gates_(model, (x,))
    trained = [p for p in model.parameters() if p.requires_grad]
    model.gate_loss_scale = 0.5
    halves = [loss_of(model, (x[i : i + 2], labels[i : i + 2])) for i in (0, 2)]
    expected = [sum(g) for g in zip(*(torch.autograd.grad(0.5 * h, trained) for h in halves),
                                    strict=True)]  # fmt: skip
    model.gate_loss_scale = 1.0
    model.budget_policy.split = Microbatches(2)
    step = lambda part: loss_of(model, part)  # noqa: E731
    accumulated(model, step, (x, labels))  # the first of its kind begins with one sample
    found = torch.autograd.grad(accumulated(model, step, (x, labels)), trained)
    assert_relatively_close(found, expected, 1e-12)
    assert model.gate_loss_scale == 1.0


def test_lists_go_sample_by_sample():
    """As of detectors, of which no step can be predicted."""

    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def forward(self, images, targets):
            scores = self.net(torch.stack(images))
            return {"loss": F.cross_entropy(scores, torch.stack(targets))}

    model = converted(Detector(), budget="1GiB")
    batch = (list(images(3)), [torch.tensor(i) for i in (0, 1, 2)])
    with pytest.raises(ConfigError, match=r"split='accumulate'"):
        model(*batch)
    model.budget_policy.hold(MemoryConfig(budget="1GiB", split="accumulate"))
    counts = []

    def step(part):
        counts.append((len(part[0]), len(part[1])))
        return model(*part)

    with pytest.warns(UserWarning, match="not known before it"):
        accumulated(model, step, batch)["loss"].backward()
    assert counts == 3 * [(1, 1)]


def test_what_cannot_be_accumulated_is_refused():
    model = converted(Net(), split="accumulate")
    model.budget_policy.split = Microbatches(1)
    with pytest.raises(DA3Error, match="NoneType without a loss"):
        accumulated(model, lambda part: None, (images(2),))
    for batch in (5, (), {"x": 3}):
        with pytest.raises(InputError, match="cannot be split"):
            accumulated(model, lambda part: part, batch)
