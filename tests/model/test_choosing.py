"""Branches that a domain can do without, chosen by its samples."""

import copy

import pytest
import torch
from helpers.domains import refused
from helpers.skips import BY_DOMAIN, config, converted, images, network, scaled
from torch import nn

from lightning_da3 import ConfigError, DA3Config, InputError, convert
from lightning_da3.model.choosing import drawn_samples
from lightning_da3.nn.ridge import Ridge


class Planted(nn.Module):
    """One block tells the classes apart, two add noise to all channels, one a little of it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.noisy1, self.good, self.noisy2 = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.quiet, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.noisy1(x).sin()
        x = x + self.good(x).square()
        x = x + self.noisy2(x).sin()
        x = x + self.quiet(x)
        return self.fc(x.mean((2, 3)))


def planted():
    torch.manual_seed(0)
    net = Planted().eval()
    with torch.no_grad():
        for noisy in (net.noisy1, net.noisy2):
            noisy.weight.mul_(100)
        net.good.weight.mul_(4)
        net.quiet.weight.mul_(0)
    return net


def samples(count=96):
    """Classes that differ in how much pixels vary, which means do not show."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(count) % 2
    noise = torch.randn(count, 3, 8, 8, generator=generator)
    return noise * (0.5 + labels)[:, None, None, None], labels


def test_useless_branches_go_first_and_the_needed_one_stays():
    model, pair = convert(planted(), config(), images()), samples()
    model.add_domain("a", 2)
    found = model.choose_branches("a", [[x[i : i + 40] for x in pair] for i in (0, 40, 80)], 0.3)
    assert {"noisy1", "noisy2"} <= {*found} <= {"noisy1", "noisy2", "quiet"}
    assert model.skipped("a") == found
    assert model.candidates is None
    assert [*model.methods.smaller] == [frozenset(found)]


def test_samples_are_drawn_from_all_batches_which_may_come_sorted_by_class():
    batches = [(torch.full((8, 3), float(i)), torch.full((8,), i), "more") for i in range(20)]
    drawn = drawn_samples(iter(batches), 32)
    x, labels = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    assert torch.equal(x[:, 0], labels.float())
    assert len(labels) == 32
    assert len(set(labels.tolist())) > 10
    everything = [pair[1] for pair in drawn_samples(batches, 160)]
    assert torch.equal(torch.cat(everything), torch.arange(20).repeat_interleave(8))


@pytest.mark.parametrize("target", [1.0, 0.9, 0.6, 0.4])
def test_the_target_is_held_and_no_more_than_that_goes(target):
    model = converted("a", make=scaled)
    found = model.choose_branches("a", [(images(8), torch.arange(8) % 3)], target)
    share = model.plan.executed_share(found)
    assert share <= target
    for name in found:  # none of them is needless
        assert model.plan.executed_share([n for n in found if n != name]) > target
    assert model.choose_branches("a", [(images(8), torch.arange(8) % 3)], 1.0) == ()


def test_a_choice_is_the_same_whatever_was_skipped_and_leaves_all_else():
    model, pair = converted("a", "b", make=scaled), (images(8), torch.arange(8) % 3)
    model.set_domain("b")
    model.train()
    before = copy.deepcopy(model.state_dict())
    found = model.choose_branches("a", [pair], 0.5)
    model.skip("a", [b.name for b in model.plan.branches])
    assert model.choose_branches("a", [pair], 0.5) == found
    assert model.active_domain == "b"
    assert all(m.training for m in model.domain("b").modules())
    state = model.state_dict()
    for name, value in before.items():
        if name != "_extra_state":
            assert torch.equal(value, state[name])


def test_candidates_compute_what_smaller_networks_do():
    for make in (scaled, None):
        model = converted("a", "b", **({} if make is None else {"make": make}))
        model.set_domain("a")
        model.eval()
        names = ["blocks.0", "blocks.2"]
        with torch.no_grad(), model.choosing():
            with model.skipping("a", tuple(names)):
                found = model(images())
            whole = model(images())
        with torch.no_grad():
            assert torch.equal(whole, model(images()))
            model.skip("a", names)
            torch.testing.assert_close(found, model(images()), rtol=1e-5, atol=1e-6)


def test_what_cannot_be_chosen_is_refused():
    model, pair = converted("a"), (images(), torch.arange(4) % 3)
    with refused(ConfigError, "FLOPs are left where Net skips all of its 3 branches"):
        model.choose_branches("a", [pair], 0.01)
    for target in (0, 1.5, "half", None):
        with refused(ConfigError, "`target` must lie in (0, 1]"):
            model.choose_branches("a", [pair], target)
    with refused(ConfigError, "`batches` must be a list or a loader"):
        model.choose_branches("a", 3, 0.5)
    with refused(InputError, "there must be at least two"):
        model.choose_branches("a", [[x[:1] for x in pair]], 0.5)
    with refused(InputError, "does not depend on the domain's head"):
        model.choose_branches("a", [pair], 0.5, lambda *_: torch.ones(()))
    with refused(InputError, "not finite"):
        model.choose_branches("a", [(pair[0] * torch.inf, pair[1])], 0.5)
    assert model.skipped("a") == ()
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(400, 3))
    with refused(ConfigError, "Sequential has no residual branch that can be skipped"):
        convert(plain, config(gate=BY_DOMAIN), images())
    headless = convert(network(), DA3Config(adapter=config().adapter, head=None), images())
    headless.add_domain("a")
    with refused(ConfigError, "has no head of its own"):
        headless.choose_branches("a", [pair], 0.5)


def test_by_domain_there_are_no_gates_noise_or_loss():
    model = converted("a", gate=BY_DOMAIN)
    model.set_domain("a")
    model.train().set_progress(0.2)
    y = model(images())
    assert torch.equal(y, model(images()))
    assert model.gate_maps(images()) == {}
    assert model.executed_flops_fraction == 1.0
    y.sum().backward()
    adapter = model.domain("a").adapter("blocks.0.conv1")
    assert not adapter.gated
    without = converted("a")
    without.domain("a").load_state_dict(model.domain("a").state_dict())
    without.set_domain("a")
    assert torch.equal(without.train()(images()), y)


@pytest.mark.parametrize("centred", [False, True])
def test_the_error_of_a_regression_is_that_of_its_rows(centred):
    torch.manual_seed(0)
    x, y = torch.randn(30, 5).double(), torch.randn(30, 3).double()
    ridge = Ridge(centred=centred)
    ridge.add(x[:11], y[:11])
    ridge.add(x[11:], y[11:])
    weights, bias = ridge.solve()
    other = Ridge(centred=centred)
    x, y = torch.randn(20, 5).double(), torch.randn(20, 3).double()
    other.add(x, y)
    want = (y - x @ weights.T - bias).square().sum()
    assert other.error(weights, bias) == pytest.approx(float(want))
