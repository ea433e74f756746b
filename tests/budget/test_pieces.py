"""Batches that go through a network in microbatches."""

import pytest
import torch
from helpers.budgets import KIB, Net, Regions, converted, gradients, images
from helpers.comparing import assert_relatively_close, mix_gates_
from torch import nn

from lightning_da3 import (
    InputError,
    MemoryConfig,
)
from lightning_da3.budget.microbatches import Microbatches
from lightning_da3.memory import (
    SavedActivations,
)


class OverTheBatch(nn.Module):
    """Every sample beside every other."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 4, 1)
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        y = self.fc(self.conv(x).mean((2, 3)))
        return y @ y.T


SPLITS = [
    Microbatches(2),
    Microbatches(4),
    Microbatches(1, 3),
    Microbatches(2, 3),
    Microbatches(2, 1),
]


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "exact", "tolerance"),
    [
        (torch.float64, True, 1e-12),
        (torch.float64, False, 1e-12),
        (torch.float32, True, 2e-5),
        (torch.float32, False, 1e-3),  # what differs by rounding may have another 8-bit code
    ],
)
def test_pieces_give_the_gradients_of_the_whole_batch(split, exact, dtype, tolerance):
    model = converted(Net(), exact=exact).to(dtype)
    x = images(dtype=dtype)
    mix_gates_(model, (x,))
    output, expected = gradients(model, x, None)
    executed = model.executed_flops_fraction
    assert 0.1 < executed < 0.9  # the gates' own loss matters
    same, found = gradients(model, x, split)
    assert_relatively_close([same], [output], tolerance)
    assert_relatively_close([model.executed_flops_fraction], [executed], tolerance)
    assert_relatively_close(found, expected, tolerance)


def test_again_means_that_nothing_is_kept():
    model, x = converted(Net()), images()
    kept = {}
    for split in (None, Microbatches(2), Microbatches(2, 2), Microbatches(1, 6)):
        model.budget_policy.split = split
        with SavedActivations(model, inputs=x) as saved:
            output = model(x)
        del output
        kept[split] = saved.bytes
    whole = kept[None]
    assert abs(kept[Microbatches(2)] - whole) <= 0.02 * whole
    assert kept[Microbatches(2, 2)] <= whole / 3 * 1.05 + x.nbytes  # the images, which exist anyway
    assert kept[Microbatches(1, 6)] <= 0.05 * whole + x.nbytes


def test_random_gates_are_drawn_again_as_they_were():
    model, x = converted(Net(), noise=True), images(dtype=torch.float64)
    model.double().set_progress(0.0)
    torch.manual_seed(1)
    _, expected = gradients(model, x, Microbatches(2))
    after = torch.rand(1)
    torch.manual_seed(1)
    _, found = gradients(model, x, Microbatches(2, 3))
    assert_relatively_close(found, expected, 1e-12)
    assert torch.equal(torch.rand(1), after)


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_every_sample_has_its_own_noise_however_a_batch_is_split(split):
    model, x = converted(Net(), noise=True), images(dtype=torch.float64)
    model.double().set_progress(0.0)
    mix_gates_(model, (x,))
    found = []
    for seed, how in ((1, None), (1, split), (2, None)):
        torch.manual_seed(seed)
        found.append(gradients(model, x, how)[1])
    assert_relatively_close(found[1], found[0], 1e-12)
    assert any((a - b).norm() > 0.01 * b.norm() for a, b in zip(found[2], found[0], strict=True))


def test_dicts_keywords_and_large_outputs():
    model, x = converted(Regions()).double(), images(dtype=torch.float64)
    scale = torch.rand(6, dtype=torch.float64, requires_grad=True)
    expected, wanted = gradients(model, x, None, scale=scale)
    for split in (Microbatches(4), Microbatches(2, 2)):
        found, same = gradients(model, x, split, scale=scale)
        assert_relatively_close([found], [expected], 1e-12)
        assert_relatively_close(same, wanted, 1e-12)
    grads = []
    for split in (None, Microbatches(2, 1)):
        model.budget_policy.split = split
        grads.append(torch.autograd.grad(model(x, scale=scale)["out"].square().sum(), scale)[0])
    assert_relatively_close([grads[1]], [grads[0]], 1e-12)
    assert model(x, scale=scale)["size"] == 3


def test_outputs_that_cannot_be_joined_are_refused():
    model = converted(OverTheBatch())
    model.budget_policy.split = Microbatches(2)
    with pytest.raises(InputError, match=r"cannot be joined.*split='accumulate'"):
        model(images(3))
    model.budget_policy.split = None
    model.budget_policy.hold(MemoryConfig(budget=40 * KIB))
    with pytest.raises(InputError, match="samples of a batch act on each other"):
        model(images(4))
