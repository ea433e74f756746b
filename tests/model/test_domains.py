"""Domains: adding, switching and deleting."""

import pytest
import torch
from helpers import models
from helpers.comparing import assert_identical
from helpers.domains import refused
from helpers.learned import ADAPTER, batch, converted, outputs, trainable
from torch import nn

from lightning_da3 import (
    ConfigError,
    DA3Config,
    DomainError,
    MemoryConfig,
    convert,
)
from lightning_da3.memory import SavedActivations
from lightning_da3.nn.adapter import OPEN_LOGIT


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_a_new_network_has_no_domain():
    model = converted()
    assert model.domains == []
    assert model.active_domain is None
    assert not trainable(model)


def test_adding_makes_a_fresh_domain_and_does_not_switch():
    model = converted()
    model.add_domain("a", 3)
    model.add_domain("b-2_x", 7)
    assert model.domains == ["a", "b-2_x"]
    assert model.active_domain is None
    assert not trainable(model)
    adapters = model.domain("a").adapters.values()
    assert len(adapters) == len(model.plan.hosts)
    for adapter in adapters:
        assert not adapter.value.weight.any()
        assert not adapter.value.bias.any()
        assert (adapter.attend.bias == OPEN_LOGIT).all()
    assert outputs(model, "b-2_x").shape == (2, 7)
    assert outputs(model, "a").shape == (2, 3)
    assert outputs(model, None).shape == (2, models.CLASSES)
    assert all(gate.all() for gate in model.gate_maps(batch()).values())


def test_a_domain_lives_where_the_network_does():
    model = converted().double()
    model.add_domain("a", 3)
    assert {p.dtype for p in model.domain("a").parameters()} == {torch.float64}


@pytest.mark.parametrize("name", ["", "-a", "a.b", "a b", "a/b", "ä", "a" * 101, 3, None])
def test_ill_formed_names_are_refused(name):
    with refused(DomainError, f"{name!r} cannot name a domain", "1 to 100 letters, digits"):
        converted().add_domain(name, 3)


@pytest.mark.parametrize("name", ["a", "0", "a" * 100, "Flowers-102_v2", "items", "train"])
def test_well_formed_names_are_taken(name):
    model = converted()
    model.add_domain(name, 3)
    assert model.domains == [name]


def test_wrong_numbers_of_classes_are_refused():
    model = converted()
    with refused(ConfigError, "`num_classes` is missing", "its own 'fc'", "num_classes=102"):
        model.add_domain("a")
    for value in (0, -1, 2.0, True, "3"):
        with refused(ConfigError, f"`num_classes` must be an int of at least 1, got {value!r}."):
            model.add_domain("a", value)
    without_head = converted(config=DA3Config(adapter=ADAPTER, head=None))
    with refused(ConfigError, "`num_classes` is 3", "head=None", "Leave `num_classes` out"):
        without_head.add_domain("a", 3)
    assert model.domains == without_head.domains == []


def test_a_name_is_given_once():
    model = converted("a")
    before = outputs(model, "a")
    with refused(DomainError, "There is a domain 'a' already.", "delete_domain('a')"):
        model.add_domain("a", 3)
    assert_identical(outputs(model, "a"), before)


def test_an_unknown_domain_is_refused_and_nothing_switches():
    model = converted("a", "b")
    model.set_domain("a")
    for call in (model.set_domain, model.delete_domain, model.domain):
        with refused(DomainError, "There is no domain 'c'.", "There are ['a', 'b']", "add_domain"):
            call("c")
    assert model.active_domain == "a"
    assert all(".a." in name for name in trainable(model))


class Untouchable:
    def __getattribute__(self, name):
        raise AssertionError(f"`{name}` of a domain that has no part in the switch")


def test_a_switch_touches_two_domains_only():
    model = converted("a", "b", "c", "d")
    others = {name: model.bank._modules[name] for name in "cd"}
    model.bank._modules.update(dict.fromkeys(others, Untouchable()))
    for name in ("a", "b", None, "b"):
        model.set_domain(name)
    model.bank._modules.update(others)
    assert {name for name in "abcd" if next(model.domain(name).parameters()).requires_grad} == {"b"}
    with pytest.raises(AssertionError, match="no part in the switch"):
        Untouchable().requires_grad_(False)


def test_a_domain_adds_its_own_bytes_to_a_model_and_no_more():
    def storages(thing):
        found = [*thing.parameters(), *thing.buffers()]
        return {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in found}

    model = converted("a")
    before = storages(model)
    for number in range(5):
        model.add_domain(f"more{number}", 3)
        model.set_domain(f"more{number}")
    own = sum(p.nbytes for p in model.domain("a").parameters())
    assert sum(storages(model).values()) - sum(before.values()) == 5 * own
    assert before.items() <= storages(model).items()


def test_switching_back_and_forth():
    model = converted("a", "b")
    first = {name: outputs(model, name) for name in ("a", None, "b")}
    assert not torch.equal(first["a"], first["b"])
    for name in ("b", "a", "a", None, "b", None, "a"):
        assert_identical(outputs(model, name), first[name])
        assert model.active_domain == name


def test_only_the_active_domain_trains():
    model = converted("a", "b")
    for name in ("a", "b", "b", "a"):
        model.set_domain(name)
        assert trainable(model) == {
            f"bank.{name}.{key}" for key, _ in model.domain(name).named_parameters()
        }
    model.set_domain(None)
    assert not trainable(model)
    assert not any(p.requires_grad for p in model.backbone.parameters())


def test_every_parameter_of_the_active_domain_gets_a_gradient_and_no_other():
    model = converted("a", "b").train()
    model.set_domain("a")
    model(batch()).square().sum().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == trainable(model)


def test_deleting():
    model = converted("a", "b")
    none, b = outputs(model, None), outputs(model, "b")
    model.set_domain("a")
    model.delete_domain("b")
    assert (model.active_domain, model.domains) == ("a", ["a"])
    model.delete_domain("a")
    assert (model.active_domain, model.domains) == (None, [])
    assert_identical(model(batch()), none)
    assert not any("bank" in key for key in model.state_dict())
    model.add_domain("b", 3)
    assert not torch.equal(outputs(model, "b"), b)


def test_disable_adapters():
    model = converted("a")
    none, a = outputs(model, None), outputs(model, "a")
    with model.disable_adapters():
        assert model.active_domain is None
        assert not model(batch()).requires_grad
        assert_identical(model(batch()), none)
    assert model.active_domain == "a"
    assert trainable(model)
    with pytest.raises(ZeroDivisionError), model.disable_adapters():
        raise ZeroDivisionError
    assert_identical(model(batch()).detach(), a)
    model.set_domain(None)
    with model.disable_adapters():
        assert_identical(model(batch()), none)
    assert model.active_domain is None


def test_the_mode_of_domains_follows_the_model():
    model = converted("a").eval()
    model.add_domain("b", 3)
    assert not model.domain("b").training
    model.train()
    assert model.domain("a").training
    assert model.domain("b").training


@pytest.mark.parametrize("exact", [False, True])
def test_a_convolution_as_head_keeps_codes_unless_in_exact_mode(exact):
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    model = convert(net, DA3Config(adapter=ADAPTER, memory=MemoryConfig(exact=exact)), verify=False)
    model.add_domain("a", num_classes=5)
    model.set_domain("a")
    model.train()
    head, x = model.domain("a").head, torch.randn(2, 3, 16, 16)
    with SavedActivations(model) as saved:
        y = model(x)
    whole = 2 * 8 * 8 * 8 * 4
    kept = saved.by_module.get("bank.a.head", 0)
    assert kept == whole if exact else kept < whole / 3
    assert isinstance(head, nn.Conv2d)
    y.square().mean().backward()
    assert head.weight.grad.any()
