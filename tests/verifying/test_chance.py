"""What a rounding decides in the network itself is no difference; what anything else decides is."""

import pytest
import torch
from helpers.verified import CONFIG, EXACT
from torch import nn

from lightning_da3 import convert
from lightning_da3.converting import compared
from lightning_da3.verifying.batches import Known
from lightning_da3.verifying.decisions import Decisions
from lightning_da3.verifying.expected import expected_of

torchvision = pytest.importorskip("torchvision")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Decides(nn.Module):
    """It decides by its channels, which are the same to rounding, or far apart."""

    def __init__(self, decide, *, same, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.norm = nn.Conv2d(3, 32, 3, bias=False), nn.BatchNorm2d(32)
        self.fc, self.decide = nn.Linear(32, 3), decide
        scale = torch.rand(32) + 0.5
        self.norm.weight.data = scale
        if same:
            nn.init.ones_(self.conv.weight)
            self.norm.running_var = scale**2 - self.norm.eps

    def forward(self, x):
        x = self.norm(self.conv(x))
        return self.fc(x.mean((2, 3))), self.decide(x)


def boxes(x):
    """Boxes (N, 4) that are kept, whose scores hardly differ."""
    corners = x[0, :, :2, 0].abs() + torch.arange(32.0).unsqueeze(1).to(x) * 0.3
    found = torch.cat([corners, corners + 1], 1)
    scores = x[0].mean((1, 2))
    kept = torchvision.ops.nms(found, scores, 0.3)
    return found[kept], scores[kept]


# each with another kind of operation: numbers, values at their places, a yes or no, steps
DECIDE = {
    "an order": lambda x: x.argsort(1),
    "values in an order": lambda x: x * x.mean((2, 3), keepdim=True).argsort(1),
    "the largest": lambda x: x.mean((2, 3)).topk(3).indices,
    "where the largest are": lambda x: x * x.mean((2, 3)).max(1).indices[:, None, None, None],
    "yes or no": lambda x: x > x.mean(1, keepdim=True),
    "how many": lambda x: x[x > x.mean(1, keepdim=True)],
    "whole numbers": lambda x: (x * 1e3 // x[:, :1].abs()).long(),
    "rounded": lambda x: (x / x[:, :1] * 1.5).round() + (x / x[:, :1]).floor(),
    "boxes": boxes,
}


@pytest.mark.parametrize("decide", DECIDE.values(), ids=DECIDE)
def test_what_a_rounding_decides_is_decided_alike(decide):
    x = torch.randn(2, 3, 12, 12)
    network = Decides(decide, same=True).eval()
    expected = expected_of(network, Known((x,)), thorough=True)
    model = convert(network, EXACT, x, verify=False)
    assert not all(c.ok for c in expected.compare(model))
    together = list(expected.with_decisions().compare(model))
    assert len(together) == 6
    assert all(c.difference <= 0.1 * c.tolerance for c in together)  # closely


def test_nothing_stays_python_for_what_a_rounding_decides():
    model = convert(Decides(boxes, same=True).eval(), CONFIG, torch.randn(2, 3, 12, 12))
    assert not model.plan.python  # and nothing warned


FAULTS = {
    "permuted": lambda net: net.norm.weight.data.copy_(net.norm.weight.roll(1)),
    "another value": lambda net: net.conv.weight.data.mul_(1 + 1e-3 * torch.rand(32, 1, 1, 1)),
    "one channel": lambda net: net.norm.weight.data[3].mul_(1.001),
    "statistics": lambda net: net.norm.running_mean.add_(0.01),
}


@pytest.mark.parametrize("same", [True, False], ids=["same", "apart"])
@pytest.mark.parametrize("fault_", FAULTS.values(), ids=FAULTS)
def test_faults_are_found_where_a_rounding_decides(fault_, same):
    x = torch.randn(2, 3, 12, 12)
    network = Decides(DECIDE["values in an order"], same=same).eval()
    expected = expected_of(network, Known((x,)), thorough=True).with_decisions()
    fault_(network)
    found = list(expected.compare(convert(network, EXACT, x, verify=False)))
    found = [c for c in found if c.name.startswith("outputs")]
    found = [c for c in found if "in its own types" not in c.name]  # rounding may come to as much
    assert len(found) == 4
    assert not any(c.ok for c in found)


def test_whole_numbers_that_no_rounding_decides_are_compared():
    x = torch.randn(2, 3, 12, 12)
    networks = [Decides(DECIDE["an order"], same=False, seed=seed).eval() for seed in (0, 1)]
    expected = expected_of(networks[0], Known((x,)), thorough=True).with_decisions()
    models = [convert(network, CONFIG, x, verify=False) for network in networks]
    assert all(c.ok for c in expected.compare(models[0]))
    differ = [c for c in expected.compare(models[1]) if not c.ok]
    assert any("of whole numbers differ" in str(c) for c in differ)


def test_the_command_s_comparisons_decide_alike_as_well():
    _, found = compared(Decides(DECIDE["boxes"], same=True).eval(), CONFIG, torch.randn(2, 3, 9, 9))
    assert all(c.ok for c in found)


# --- decisions by themselves ----------------------------------------------------------------------

SORTED = {
    "sort": lambda x: x.sort(0),
    "stable": lambda x: x.sort(dim=0, stable=True, descending=True),
    "topk": lambda x: x.topk(2, dim=0),
    "kthvalue": lambda x: x.kthvalue(1, 0),
    "max": lambda x: x.max(0),
    "kept axis": lambda x: x.min(0, keepdim=True),
    "cummax": lambda x: x.cummax(0),
    "last axis": lambda x: x.sort(),
    "median": lambda x: x.median(1),
}


@pytest.mark.parametrize("choose", SORTED.values(), ids=SORTED)
def test_values_come_from_where_they_stood_before(choose):
    x = torch.ones(3, 4, dtype=torch.double) + torch.arange(12).view(3, 4).flip(0) * 1e-9
    other = (x.flip(0).flip(1) - 1e-8).requires_grad_()  # nearly the same, in another order
    with Decisions() as noted:
        first = choose(x)
    with Decisions(noted, 1e-6):
        values, indices = choose(other)
    assert torch.equal(indices, first.indices)
    assert not torch.equal(choose(other).indices, first.indices)
    torch.testing.assert_close(values, first.values, rtol=0, atol=1e-7)
    (gradient,) = torch.autograd.grad(values.sum(), other)  # arrives where it was read
    (want,) = torch.autograd.grad(choose(x.requires_grad_()).values.sum(), x)
    assert torch.equal(gradient, want)


def test_what_is_asked_of_other_values_or_otherwise_is_decided_anew():
    x = torch.randn(50, dtype=torch.double)
    with Decisions() as noted:
        x.sort()
    for asked in (x.roll(1), x * 1.01):
        with Decisions(noted, 1e-6):
            assert torch.equal(asked.argsort(), asked.sort().indices)
            assert torch.equal(asked[asked.argsort()], asked.sort().values)
    with Decisions(noted, 1e-6):
        assert torch.equal(x.sort(descending=True).indices, (-x).sort().indices)


def test_what_is_asked_again_is_answered_again():
    x = torch.tensor([1.0, 2.0], dtype=torch.double)
    with Decisions() as noted:
        first, second = x > 1.5, x * (1 + 1e-9) > 1.5
    assert torch.equal(first, second)
    with Decisions(noted, 1e-6):
        assert all(torch.equal(x > 1.5, first) for _ in range(5))


def test_views_and_writes_are_no_decisions():
    x, whole = torch.randn(4), torch.zeros(4, dtype=torch.int64)
    with Decisions() as noted:
        x.view(torch.int32), whole.copy_(x), torch.add(whole, 1)
    assert not noted.made
