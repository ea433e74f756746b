"""Where a network's prologue ends."""

import pytest
import torch
import torch.nn.functional as F
from helpers.prologues import Net, Own, domain_of, hooked, images, record_masks, starts
from torch import nn

from lightning_da3 import DA3Config, convert
from lightning_da3.nn import prologue


@pytest.fixture
def few(monkeypatch):
    """Two samples of 64 x 64 pixels at once."""
    monkeypatch.setattr(prologue, "LARGEST_BYTES", 2 * 16 * 32 * 32 * 4)


@pytest.fixture
def model():
    torch.manual_seed(1)
    return domain_of(Net().eval())


def test_a_start_ends_where_the_first_host_begins(model):
    plan = model.plan.parts[0].prologue
    assert plan.source == "x"
    assert {"sub", "stem_0", "stem_2", "down", "max_pool2d", "cat"} <= {*plan.nodes}
    assert not {"last", "hosts_0", "skip", "fc"} & {*plan.nodes}
    assert plan.growth == 16 * 32 * 32 / (3 * 64 * 64)
    assert "prologue sub to cat: a large batch in microbatches" in str(model.plan)
    assert len(starts(model)) == 1


class Around(nn.Module):
    """An operation between two convolutions in front of the first host."""

    def __init__(self, operation, channels=16):
        super().__init__()
        self.first, self.operation = nn.Conv2d(3, 16, 3, 1, 1), operation
        self.second, self.third = nn.Conv2d(channels, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 4, 1)
        self.fc = nn.Linear(16, 2)

    def forward(self, x):
        x = self.second(self.operation(torch.relu(self.first(x))))
        return self.fc(self.third(x).mean((2, 3)))


MIXES = {
    "a mean of the batch": lambda x: x - x.mean(0, keepdim=True),
    "a softmax over it": lambda x: F.softmax(x, 0),
    "its end in front": lambda x: torch.cat((x[1:], x[:1])),
    "joined along it": lambda x: torch.cat((x, x)),
    "turned": lambda x: x.permute(1, 0, 2, 3).permute(1, 0, 2, 3),
    "a user's hook": hooked(),
    "its size": lambda x: x / len(x),
}


ALONE = {
    "a pool": nn.AvgPool2d(3, 1, 1),
    "a norm": nn.GroupNorm(4, 16),
    "a norm of channels": lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (16,)).permute(0, 3, 1, 2),
    "joined channels": lambda x: torch.cat((x, x.sigmoid()), -3),
    "a product": lambda x: x * torch.sigmoid(x),
    "its own layer": Own(),
}


@pytest.mark.parametrize("name", MIXES)
def test_what_looks_at_more_than_one_sample_ends_it(name, few):
    network = Around(MIXES[name]).eval()
    model = convert(network)
    (plan,) = (part.prologue for part in model.plan.parts)
    assert "first" in plan.nodes
    assert "second" not in plan.nodes
    torch.testing.assert_close(model(images(4)), network(images(4)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ALONE)
def test_what_looks_at_every_sample_alone_belongs_to_it(name, few):
    network = Around(ALONE[name], 32 if name == "joined channels" else 16).eval()
    model = convert(network)
    (plan,) = (part.prologue for part in model.plan.parts)
    assert "second" in plan.nodes
    torch.testing.assert_close(model(images(5)), network(images(5)), rtol=1e-4, atol=1e-5)


def overwritten(x):
    seen = x.mean((2, 3), keepdim=True).softmax(1)
    return F.silu(x * 1, inplace=True) * 2 + seen


def scaled(x):
    x = x * 2
    seen = x.mean(0, keepdim=True)
    x.mul_(3.0)
    return x * 2 + seen


def written_elsewhere(x):
    turned = x.permute(0, 2, 3, 1)
    x.add_(x.mean(0, keepdim=True))
    return turned.permute(0, 3, 1, 2) + 1


def rectified(x):
    x = x * 2
    seen = x.mean(0, keepdim=True)
    y = F.relu(x, inplace=True)
    return y * 2 + seen


@pytest.mark.parametrize("operation", [overwritten, scaled, written_elsewhere, rectified])
@pytest.mark.parametrize("largest", [1, 2**50])
def test_nothing_is_written_before_others_have_read_it(operation, largest, monkeypatch):
    monkeypatch.setattr(prologue, "LARGEST_BYTES", largest)
    network = Around(operation).eval()
    model = convert(network)
    assert starts(model)
    torch.testing.assert_close(model(images(5)), network(images(5)), rtol=1e-5, atol=1e-6)


def test_a_single_layer_may_be_all(few):
    model = convert(Around(lambda x: x - x.mean(0)).eval())
    assert model.plan.parts[0].prologue.nodes == ("first", "relu")
    cuts = record_masks(model)
    model(images(5))
    assert cuts == [(1, 5)]


def test_without_large_maps_there_is_none():
    network = nn.Sequential(
        nn.Conv2d(3, 2, 3, 2), nn.ReLU(), nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3)
    )
    assert convert(network, DA3Config(head=None)).plan.parts[0].prologue is None
