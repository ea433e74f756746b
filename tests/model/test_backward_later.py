"""The backward uses what held in the forward, whatever holds when it runs."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.around import Around
from helpers.comparing import add
from torch import nn

from lightning_da3 import AdapterConfig, DA3Config, GateConfig, MemoryConfig, convert

ADAPTER = AdapterConfig(hidden_channels=4, max_cells=16, min_stride=1)


class Deep(nn.Module):
    """Exact mode computes much of it again, with the adapters in it."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8, 5)
        block = [nn.Conv2d(8, 8, 3, padding=1), nn.GELU(), nn.GroupNorm(2, 8), nn.Tanh()]
        self.blocks = nn.Sequential(*[copy.deepcopy(layer) for _ in range(8) for layer in block])

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def test_exact_mode_computes_adapters_again():
    model = converted(Deep, exact=True)
    assert any(region.with_hosts for region in model.plan.regions)


def converted(network, *domains, exact, gate=None):
    torch.manual_seed(0)
    model = convert(network().double(), DA3Config(ADAPTER, gate, memory=MemoryConfig(exact=exact)))
    for i, name in enumerate(domains):
        add(model, name, seed=i)
    return model.train()


def grads(model):
    return {k: p.grad.clone() for k, p in model.bank.named_parameters() if p.grad is not None}


def small():
    return Around(nn.ReLU())


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("network", [small, Deep])
def test_two_domains_in_one_loss_both_learn(network, exact):
    model = converted(network, "a", "b", "c", exact=exact)
    x = torch.randn(2, 2, 3, 16, 16, dtype=torch.double)

    def step(*names):
        model.zero_grad()
        loss = 0.0
        for name in names:
            model.set_domain(name)
            loss = loss + model(x["ab".index(name)]).square().mean()
        model.set_domain("c" if len(names) > 1 else names[0])
        loss.backward()
        return grads(model)

    want = {**step("a"), **step("b")}
    got = step("a", "b")
    assert got.keys() == want.keys()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, want[name])
    trained = {name.split(".")[0] for name, p in model.bank.named_parameters() if p.requires_grad}
    assert trained == {"c"}  # the others rest again


def test_one_domain_goes_on_where_another_was_active_between():
    model = converted(small, "a", "b", exact=True)
    model.set_domain("a")
    loss = model(torch.randn(2, 3, 16, 16, dtype=torch.double)).square().mean()
    with model.disable_adapters():
        loss.backward()
    assert all(p.grad is not None for p in model.domain("a").parameters())
    assert all(p.requires_grad for p in model.domain("a").parameters())
    assert all(p.grad is None for p in model.domain("b").parameters())


CHANGES = {
    "nothing": lambda model: None,
    "eval": lambda model: model.eval(),
    "progress": lambda model: model.set_progress(0.9),
    "another domain": lambda model: model.set_domain("b"),
    "no domain": lambda model: model.set_domain(None),
}


@pytest.mark.parametrize("exact", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_before_the_backward_changes_nothing(change, exact):
    model = converted(Deep, "a", "b", exact=exact, gate=GateConfig(target=0.5, by="cell"))
    x = torch.randn(2, 3, 16, 16, dtype=torch.double)

    def step(change):
        model.zero_grad()
        model.set_domain("a")
        model.train().set_progress(0.1)
        torch.manual_seed(1)
        loss = model(x).square().sum()
        CHANGES[change](model)
        loss.backward()
        return grads(model)

    want, got = step("nothing"), step(change)
    assert got.keys() == want.keys()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, want[name])


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("network", [small, pytest.param(Deep, marks=pytest.mark.slow)])
def test_a_backward_inside_autocast_is_one_outside(network, exact):
    model = converted(network, "a", exact=exact).float()
    model.set_domain("a")
    x = torch.randn(4, 3, 16, 16)
    found = []
    for inside in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), torch.tensor([0, 1, 2, 0]))
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            loss.backward()
        found.append(grads(model))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("exact", [True, False])
def test_a_forward_without_autocast_has_its_backward_without(exact):
    model = converted(Deep, "a", exact=exact).float()
    model.set_domain("a")
    x = torch.randn(2, 3, 16, 16)
    found = []
    for inside in (False, True):
        model.zero_grad()
        loss = model(x).square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            loss.backward()
        found.append(grads(model))
    for name, gradient in found[0].items():
        # PyTorch's own matrix products, such as the head's, are lowered there
        assert (found[1][name] - gradient).norm() <= 0.03 * gradient.norm()
