"""State dicts: a model's own, its domains alone, and its network's from before."""

import pytest
import torch
from helpers import models
from helpers.comparing import assert_identical
from helpers.domains import refused
from helpers.learned import (
    ADAPTER,
    CONFIG,
    assert_same_domains,
    batch,
    converted,
    outputs,
    trainable,
)
from torch import nn

from lightning_da3 import (
    CheckpointError,
    DA3Config,
    convert,
)
from lightning_da3.model.state import domain_state


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_states_of_before_addends_had_a_scale_compute_what_they_did():
    model, other = converted("a"), converted()
    state = model.state_dict()
    values = [name for name in state if ".value." in name]
    assert values
    state |= {name: 4 * state[name] for name in values}
    state["_extra_state"]["config"]["version"] = 1
    other.load_state_dict(state)
    assert_same_domains(model, other, (None, "a"))


def test_own_state_comes_back_into_a_network_without_domains():
    model, other = converted("a", "b"), converted()
    model.set_domain("a")
    result = other.load_state_dict(model.state_dict())
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert other.domains == ["a", "b"]
    assert other.active_domain is None  # which domain computes is no state
    assert not trainable(other)
    assert_same_domains(other, model)


def test_state_of_the_domains_alone():
    model, other = converted("a", "b"), converted("b")
    state = domain_state(model)
    assert state
    assert not any(key.startswith("backbone.") for key in state)
    other.load_state_dict(state)
    assert other.domains == ["b", "a"]
    assert_same_domains(other, model)


def test_domains_that_only_the_model_has_are_kept():
    model, other = converted("a"), converted("b")
    before = outputs(other, "b")
    other.load_state_dict(model.state_dict())
    assert_identical(outputs(other, "b"), before)
    assert_same_domains(other, model, (None, "a"))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_the_network_s_own_state_goes_into_the_backbone():
    for name in ("Residual", "SharedLayers", "NormFirst", "PaddingModes"):
        source = models.randomise_(models.ZOO[name](), seed=9)
        model = converted(name=name)
        result = model.load_state_dict(source.state_dict())
        assert not result.missing_keys
        assert not result.unexpected_keys
        x = batch(name)
        torch.testing.assert_close(model(x), source.eval()(x))
        assert model.fingerprint == convert(source, CONFIG).fingerprint
        assert not torch.equal(model(x), converted(name=name)(x))


class NamedBackbone(nn.Module):
    """A network whose own parts are called as ours are."""

    def __init__(self):
        super().__init__()
        self.backbone, self.bank = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x):
        return self.bank(self.backbone(x).relu().mean((2, 3)))


def test_the_state_of_a_network_with_our_names_goes_into_the_backbone():
    source, model = NamedBackbone(), convert(NamedBackbone(), CONFIG)
    model.load_state_dict(source.state_dict())
    torch.testing.assert_close(model(batch()), source(batch()))
    model.add_domain("a", 3)
    other = convert(source, CONFIG)
    other.load_state_dict(model.state_dict())
    assert_same_domains(other, model, (None, "a"))


def test_a_missing_tensor_is_reported():
    state = models.zoo("Residual").state_dict()
    del state["conv1.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*backbone\.conv1\.weight"):
        converted().load_state_dict(state)
    state = converted("a").state_dict()
    del state["bank.a.head.weight"]
    for model in (converted(), converted("a")):
        domains = model.domains
        with refused(CheckpointError, "It lacks ['bank.a.head.weight']."):
            model.load_state_dict(state)
        assert model.domains == domains


class Bigger(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net, self.own = net, nn.Linear(2, 2)


def test_state_of_a_bigger_module():
    model = Bigger(converted("a", "b"))
    whole = Bigger(converted())
    whole.load_state_dict(model.state_dict())
    assert_same_domains(whole.net, model.net)
    assert_identical(whole.own.weight, model.own.weight)

    domains = Bigger(converted())
    state = domain_state(model)
    assert "own.weight" in state
    assert not any("backbone" in key for key in state)
    domains.load_state_dict(state)
    assert_same_domains(domains.net, model.net)

    source = models.randomise_(models.ZOO["Residual"](), seed=9)
    pretrained = Bigger(converted())
    pretrained.load_state_dict(Bigger(source).state_dict())
    torch.testing.assert_close(outputs(pretrained.net, None), source.eval()(batch()))


def test_a_state_learned_on_another_backbone_is_refused():
    other = convert(models.randomise_(models.zoo("Residual"), seed=9), CONFIG)
    before = other.state_dict()
    with refused(CheckpointError, "domains ['a'] were learned on another backbone", "Convert the"):
        other.load_state_dict(domain_state(converted("a")))
    assert other.domains == []
    assert other.state_dict().keys() == before.keys()


def test_a_state_that_holds_nothing_of_the_network():
    with pytest.raises(RuntimeError, match=r"Missing key.*bank\.a\.head\.weight"):
        converted("a").load_state_dict({})
    module = Bigger(converted("a"))
    state = {"own.weight": torch.zeros(2, 2), "own.bias": torch.zeros(2)}
    with pytest.raises(RuntimeError, match=r"Missing key.*net\.bank\.a\.head\.weight"):
        module.load_state_dict(state)
    module.load_state_dict(state, strict=False)  # a part of it, as the user says
    assert not module.own.weight.any()


HUGE = 10**9


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"num_classes": {"a": HUGE}}, str(HUGE)),
        ({"num_classes": {"a": 10**30}}, "`num_classes` must be below"),
        ({"num_classes": {"a": "3"}}, "`num_classes` must be an int"),
        ({"num_classes": {"a": 3, "b": HUGE}}, "It lacks ['bank.b.adapters"),
        ({"num_classes": {"a": 3, "../b": 3}}, "cannot name a domain"),
        ({"num_classes": {"a": 3, 7: 3}}, "cannot name a domain"),
        ({"num_classes": {}}, "has 'bank.a."),
        ({"num_classes": [3]}, "does not say whose domains it holds"),
        ({"class_names": [3]}, "does not say whose domains"),
        ({"class_names": {"a": 3}}, "does not fit this model"),
        ({"backbone": None}, "does not say whose domains"),
        ({"active": 3}, "does not say whose domains"),
        ({"active": "z"}, "does not say whose domains"),
        ({"config": 3}, "does not say whose domains"),
        ({"config": {"memory": 3}}, "config cannot be read"),
    ],
)
def test_what_a_state_says_is_not_believed(change, part):
    state = domain_state(converted("a"))
    state["_extra_state"] = {**state["_extra_state"], **change}
    for model in (converted(), converted("a")):
        domains = model.domains
        before = {k: v.clone() for k, v in model.named_parameters()}
        with refused(CheckpointError, part):
            model.load_state_dict(state)
        assert model.domains == domains
        assert all(torch.equal(v, before[k]) for k, v in model.named_parameters())


@pytest.mark.parametrize("extra", [3, "x", [], {}, {"backbone": "x"}])
def test_a_state_that_says_nothing(extra):
    state = {**domain_state(converted("a")), "_extra_state": extra}
    with refused(CheckpointError, "does not say whose domains it holds"):
        converted().load_state_dict(state)


@pytest.mark.parametrize("value", ["x", 3, None, torch.zeros(3, dtype=torch.long)])
def test_tensors_that_are_none(value):
    state = {**domain_state(converted("a")), "bank.a.head.bias": value}
    model = converted()
    with refused(CheckpointError, "'bank.a.head.bias' is "):
        model.load_state_dict(state)
    assert model.domains == []


class SaysMore(nn.Sequential):
    """A network with an extra state of its own."""

    def get_extra_state(self):
        return {"version": 3}

    def set_extra_state(self, state):
        pass


def test_the_extra_state_of_the_user_s_own_network():
    source = SaysMore(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 14 * 14, 5))
    twin = SaysMore(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 14 * 14, 5))
    model = convert(twin, CONFIG)
    model.load_state_dict(source.state_dict())
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model(x), source(x))


def test_loading_leaves_the_given_state_alone():
    state = converted("a").state_dict()
    keys = list(state)
    converted("b").load_state_dict(state)
    assert list(state) == keys


def test_the_fingerprint_leaves_out_the_head_and_counters():
    one = models.zoo("Residual")
    other = models.zoo("Residual")
    nn.init.zeros_(other.fc.weight)
    other(batch())  # in train mode: counts a batch, but moves the statistics, too
    other.load_state_dict(one.state_dict() | {"fc.weight": other.fc.weight})
    other.stem[1].num_batches_tracked.add_(5)
    assert convert(one, CONFIG).fingerprint == convert(other, CONFIG).fingerprint
    without_head = DA3Config(adapter=ADAPTER, head=None)
    assert convert(one, without_head).fingerprint != convert(other, without_head).fingerprint
    other.stem[1].running_mean.add_(1e-3)
    assert convert(one, CONFIG).fingerprint != convert(other, CONFIG).fingerprint
