"""Which branches can be skipped, and that what stands for a sum is not overwritten."""

import pytest
import torch
import torch.nn.functional as F
from helpers import models
from helpers.skips import config, images
from torch import nn

from lightning_da3 import convert


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.other, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x):
        x = self.body(self.stem(x))
        if isinstance(x, tuple):
            return self.fc(x[0].mean((2, 3))), *x[1:]
        return self.fc(x.mean((2, 3)))


class Method(Base):
    def body(self, x):
        return self.other(x.add(self.conv(x).relu()))


class InPlace(Base):
    """The sum is written into what the branch reads, and that is read again."""

    def body(self, x):
        x = self.stem_again(x)
        x += self.conv(x)
        return F.relu_(x), x

    def stem_again(self, x):
        return self.other(x)


class ReadLater(Base):
    """What the branch reads is an output, too, and the sum is overwritten."""

    def body(self, x):
        y = self.conv(x)
        y += x
        return F.relu_(y), x


class WrittenLater(Base):
    """What the branch reads is overwritten before the sum is read."""

    def body(self, x):
        y = x + self.conv(x)
        z = F.relu_(x)
        return self.other(y), z


class SigmoidBefore(Base):
    """Whose backward needs what it gave, and the sum is overwritten."""

    def body(self, x):
        x = torch.sigmoid(self.other(x))
        return F.relu_(x + self.conv(x))


class Nested(Base):
    def body(self, x):
        y = self.conv(x)
        return x + (y + self.other(y))


class Python(nn.Module):
    """Switches a mode, and counts how often it runs."""

    runs = 0

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        type(self).runs += 1
        with torch.autocast("cpu", enabled=False):
            return self.conv(x).relu()


class PythonInside(Base):
    def __init__(self):
        super().__init__()
        self.python = Python()

    def body(self, x):
        return self.other(x + self.python(x))


class ReadByOthers(Base):
    def body(self, x):
        y = self.conv(x)
        return x + y.relu(), y


class Broadcast(Base):
    def body(self, x):
        return self.other(x + self.conv(x).mean((2, 3), keepdim=True))


class Scaled(Base):
    def body(self, x):
        return self.other(torch.add(x, self.conv(x), alpha=2))


class WritesFirst(Base):
    """What the branch reads is written before."""

    def body(self, x):
        return x + self.conv(F.relu_(x))


class Draws(Base):
    def body(self, x):
        return self.other(x + F.dropout(self.conv(x), 0.5, training=True))


class NoShortcut(Base):
    def body(self, x):
        return self.other(x) + self.conv(x)


class Zero(nn.Module):
    def forward(self, x):
        return torch.zeros_like(x)


def converted(kind):
    torch.manual_seed(0)
    network = models.randomise_(kind()).eval()
    model = convert(network, config(exact=True), images())
    model.add_domain("a", 5)
    model.set_domain("a")
    if model.domain("a").head is not None:
        model.domain("a").head.load_state_dict(network.fc.state_dict())
    return network, model


@pytest.mark.filterwarnings("ignore:.*stays Python")
@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (Method, ["conv"]),
        (InPlace, ["conv"]),
        (ReadLater, ["conv"]),
        (WrittenLater, ["conv"]),
        (SigmoidBefore, ["conv"]),
        (PythonInside, ["python.conv"]),
        (WritesFirst, ["conv"]),
    ],
)
def test_skipped_it_is_the_network_whose_branch_gives_zero(kind, names):
    network, model = converted(kind)
    assert [branch.name for branch in model.plan.branches] == names
    model.skip("a", names)
    setattr(network, names[0].split(".")[0], Zero())
    runs = Python.runs
    x, same = (images().requires_grad_() for _ in range(2))
    got = model.train()(x)
    assert Python.runs == runs
    want = network(same)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for y, each in ((got, x), (want, same)):
        loss = sum(t.square().sum() for t in (y if isinstance(y, tuple) else (y,)))
        loss.backward()
        assert each.grad is not None
    torch.testing.assert_close(x.grad, same.grad, rtol=1e-4, atol=1e-5)


def test_branches_in_branches_count_once():
    _, model = converted(Nested)
    plan = model.plan
    inner, outer = plan.branches
    assert (inner.name, outer.within, inner.within) == ("other", (), (outer.name,))
    assert outer.macs == 2 * inner.macs
    both = plan.executed_share([inner.name, outer.name])
    assert both == plan.executed_share([outer.name]) < plan.executed_share([inner.name])
    model.skip("a", [inner.name, outer.name])
    assert {*model.domain("a").closed} == {"conv", "other"}
    assert model(images()).shape == (4, 5)


@pytest.mark.parametrize("kind", [ReadByOthers, Broadcast, Scaled, Draws, NoShortcut])
def test_what_cannot_be_skipped(kind):
    assert converted(kind)[1].plan.branches == ()
