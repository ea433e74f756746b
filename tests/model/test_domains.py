"""Domains: adding, switching, saving, loading, and the gates' budget."""

import math

import pytest
import torch
from helpers import models
from helpers.domains import refused, shake_
from torch import nn

from lightning_da3 import (
    AdapterConfig,
    CheckpointError,
    ConfigError,
    DA3Config,
    DomainError,
    GateConfig,
    convert,
)
from lightning_da3.files.domain_file import read_domain, write_domain
from lightning_da3.model.state import domain_state
from lightning_da3.nn.adapter import OPEN_LOGIT
from lightning_da3.nn.gate import (
    Executed,
    annealed_target,
    budget_loss,
    executed_fraction,
    with_loss,
)

ADAPTER = AdapterConfig(hidden_channels=4, max_cells=16, min_stride=1)
CONFIG = DA3Config(adapter=ADAPTER)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def converted(*domains, name="Residual", config=CONFIG):
    """A network with domains that have learned something: random parameters."""
    model = convert(models.zoo(name), config)
    for domain in domains:
        model.add_domain(domain, None if config.head is None else 3)
        shake_(model, domain)
    return model


def batch(name="Residual"):
    return models.inputs(name)[0]


@torch.no_grad()
def outputs(model, domain):
    model.set_domain(domain)
    return model(batch())


def assert_identical(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def assert_same_domains(model, other, names=(None, "a", "b")):
    for name in names:
        assert_identical(outputs(model, name), outputs(other, name))


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


# --- the verbs


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


@pytest.mark.parametrize("name", ["a", "0", "a" * 100, "Flowers-102_v2"])
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
        assert not trainable(model)
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


# --- state dicts


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
        with pytest.raises(RuntimeError, match=r"Missing key.*bank\.a\.head\.weight"):
            model.load_state_dict(state)


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


# --- domain files


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.safetensors"


def test_a_saved_domain_comes_back_bit_for_bit(path):
    model = converted("a")
    model.save_domain("a", path, accuracy=0.5)
    other = converted("b")
    assert other.load_domain(path) == "a"
    assert other.domains == ["b", "a"]
    assert other.active_domain is None
    assert not trainable(other)
    assert other.domain("a").num_classes == 3
    assert_same_domains(other, model, (None, "a"))
    assert read_domain(path).metadata["extra"] == {"accuracy": 0.5}


def test_a_saved_domain_under_another_name(path):
    model = converted("a")
    model.save_domain("a", path)
    assert model.load_domain(path, name="twin") == "twin"
    assert_identical(outputs(model, "twin"), outputs(model, "a"))


def test_a_domain_without_a_head(path):
    config = DA3Config(adapter=ADAPTER, head=None, gate=None)
    model, other = converted("a", config=config), converted(config=config)
    model.save_domain("a", path)
    other.load_domain(path)
    assert_same_domains(other, model, (None, "a"))


def test_the_file_holds_the_domain_alone(path):
    model = converted("a", "b")
    model.save_domain("a", path)
    own = model.domain("a").state_dict()
    assert read_domain(path).tensors.keys() == own.keys()
    assert path.stat().st_size < sum(t.numel() * 4 for t in own.values()) + 8_000


def test_a_domain_of_another_backbone_is_refused(path):
    model = converted("a")
    model.save_domain("a", path)
    other = convert(models.randomise_(models.zoo("Residual"), seed=9), CONFIG)
    with refused(
        CheckpointError,
        f"The domain file {str(path)!r} does not fit this model",
        "It was learned on another backbone (Residual",
        model.fingerprint[:12],
        other.fingerprint[:12],
    ):
        other.load_domain(path)
    assert other.domains == []


def test_a_domain_of_another_config_is_refused_with_every_difference(path):
    converted("a").save_domain("a", path)
    config = DA3Config(adapter=AdapterConfig(hidden_channels=5, min_stride=1), gate=None)
    other = converted(config=config)
    parts = ("Its config has adapter={", "Its config has gate={", "Convert with the config that")
    with refused(CheckpointError, *parts):
        other.load_domain(path)
    assert other.domains == []


def test_a_domain_s_own_name_may_be_taken(path):
    model = converted("a")
    model.save_domain("a", path)
    shake_(model, "a")
    before = outputs(model, "a")
    with refused(DomainError, "There is a domain 'a' already."):
        model.load_domain(path)
    assert model.domains == ["a"]
    assert_identical(outputs(model, "a"), before)


def test_damaged_and_foreign_files_are_refused(path):
    model = converted("a")
    model.save_domain("a", path)
    content = path.read_bytes()
    other = converted()
    for length in (0, 5, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with refused(CheckpointError, f"Cannot read the domain file {str(path)!r}"):
            other.load_domain(path)
    with refused(CheckpointError, "Cannot read the domain file"):
        other.load_domain(path.with_name("missing"))
    write_domain(path, {"x": torch.zeros(1)}, {"domain": "a"})
    with refused(CheckpointError, "it lacks [", "'config'", "`save_domain` writes whole ones"):
        other.load_domain(path)
    assert other.domains == []


def test_tensors_that_do_not_fit_are_refused_and_leave_nothing(path):
    model = converted("a")
    model.save_domain("a", path)
    file = read_domain(path)
    tensors = {**file.tensors, "head.weight": torch.zeros(9, 9)}
    write_domain(path, tensors, file.metadata)
    other = converted()
    with refused(CheckpointError, "does not fit this model", "head.weight"):
        other.load_domain(path)
    assert other.domains == []
    assert other.active_domain is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_is_refused_and_the_last_good_file_stays(path, value):
    model = converted("a")
    model.save_domain("a", path)
    content, good = path.read_bytes(), outputs(model, "a")
    with torch.no_grad():
        model.domain("a").head.bias[0] = value
    with refused(CheckpointError, "NaN or infinite values in ['head.bias']", "last good file"):
        model.save_domain("a", path)
    assert path.read_bytes() == content
    other = converted()
    other.load_domain(path)
    assert_identical(outputs(other, "a"), good)


def test_an_unknown_domain_is_not_saved(path):
    with refused(DomainError, "There is no domain 'b'."):
        converted("a").save_domain("b", path)
    assert not path.exists()


# --- gates


def test_executed_fraction_by_hand():
    executed = [
        Executed(torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]], [[[1.0, 1.0], [1.0, 0.0]]]]), 300.0),
        Executed(torch.tensor([[[[1.0]]], [[[0.0]]]]), 100.0),
    ]
    # (1/4 + 3/4) / 2 of 300 and 1/2 of 100
    torch.testing.assert_close(executed_fraction(executed), torch.tensor(0.5))
    torch.testing.assert_close(executed_fraction(executed[:1] * 2), torch.tensor(0.5))
    executed[1] = Executed(torch.ones(2, 1, 1, 1), 100.0)
    torch.testing.assert_close(executed_fraction(executed), torch.tensor((150 + 100) / 400))
    torch.testing.assert_close(budget_loss(executed, 0.5), torch.tensor(0.125**2))


def test_the_target_falls_from_1_over_the_first_half():
    assert annealed_target(0.4, 0.0) == 1.0
    assert annealed_target(0.4, 0.25) == pytest.approx(0.7)
    for progress in (0.5, 0.8, 1.0):
        assert annealed_target(0.4, progress) == pytest.approx(0.4)
    values = [annealed_target(0.4, i / 20) for i in range(21)]
    assert values == sorted(values, reverse=True)


def test_executed_flops_fraction_of_a_network_by_hand():
    model = converted("a", name="ConvNorm")
    with torch.no_grad():
        first, second = model.domain("a").adapters.values()
        for adapter, logit in ((first, -1.0), (second, 1.0)):
            adapter.attend.weight.zero_()
            adapter.attend.bias.fill_(logit)
    model.set_domain("a")
    model(batch("ConvNorm"))
    first_macs, second_macs = 3 * 4 * 9 * 36, 4 * 6 * 9 * 36
    expected = second_macs / (first_macs + second_macs)
    assert model.executed_flops_fraction.item() == pytest.approx(expected)
    model.set_domain(None)
    model(batch("ConvNorm"))
    assert model.executed_flops_fraction is None


def test_a_closed_gate_leaves_what_is_added_alone():
    model = converted("a", name="ConvNorm", config=DA3Config(adapter=ADAPTER, head=None))
    with torch.no_grad():
        for adapter in model.domain("a").adapters.values():
            adapter.attend.bias.fill_(-100.0)
            adapter.value.bias.zero_()
    model.set_domain("a")
    net = models.zoo("ConvNorm").eval()
    expected = net.fc(torch.zeros(2, 6))  # ReLU of nothing
    torch.testing.assert_close(model(batch("ConvNorm")), expected)


def test_gate_maps():
    model = converted("a", name="Depthwise")
    model.set_domain("a")
    maps = model.gate_maps(batch("Depthwise"))
    assert {name: tuple(gate.shape) for name, gate in maps.items()} == {
        "stem": (2, 1, 3, 3),  # maps of 6 x 6 on at most 16 cells
        "block.3": (2, 1, 3, 3),
    }
    for gate in maps.values():
        assert set(gate.unique().tolist()) <= {0.0, 1.0}
        assert not gate.requires_grad
    model.set_domain(None)
    assert model.gate_maps(batch("Depthwise")) == {}
    without = converted("a", config=DA3Config(adapter=ADAPTER, gate=None))
    without.set_domain("a")
    assert without.gate_maps(batch()) == {}


def test_with_loss_leaves_outputs_untouched_and_minimises_the_loss():
    x, weight = torch.randn(3, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    y = with_loss(x * 1, weight.square(), scale=0.5)
    assert_identical(y.detach(), x.detach())
    y.sum().backward()
    assert_identical(x.grad, torch.ones(3))
    assert weight.grad.item() == 0.5 * 2 * 2.0


@pytest.mark.parametrize("name", ["Residual", "DictOutput", "TwoInputsTwoOutputs"])
def test_the_budget_rides_on_the_output_while_training(name):
    head = None if name in models.WITHOUT_A_HEAD else "auto"
    heavy, light = (
        converted("a", name=name, config=DA3Config(adapter=ADAPTER, gate=gate, head=head))
        for gate in (GateConfig(weight=100.0), GateConfig(weight=0.0))
    )
    light.load_state_dict(heavy.state_dict())
    x = models.inputs(name)
    for model in (heavy, light):
        model.set_domain("a")
        model.train()
    got, expected = heavy(*x), light(*x)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)

    def gate_gradient(model, outputs):
        leaves = torch.utils._pytree.tree_leaves(outputs)
        sum(leaf.sum() for leaf in leaves).backward()
        adapters = model.domain("a").adapters.values()
        return torch.cat([adapter.attend.bias.grad for adapter in adapters])

    assert not torch.allclose(gate_gradient(heavy, got), gate_gradient(light, expected))
    heavy.eval()
    heavy.zero_grad()
    light.zero_grad()
    one, other = gate_gradient(heavy, heavy(*x)), gate_gradient(light, light(*x))
    torch.testing.assert_close(one, other)  # in eval nothing is added


@pytest.mark.parametrize("target", [0.3, 0.7])
def test_training_moves_the_executed_fraction_to_its_target(target):
    gate = GateConfig(target=target, weight=20.0)
    model = converted(config=DA3Config(adapter=ADAPTER, gate=gate))
    model.add_domain("a", 3)
    model.set_domain("a")
    model.train()
    x, labels = torch.randn(32, 3, 12, 12), torch.randint(3, (32,))
    optimizer = torch.optim.Adam(model.domain("a").parameters(), 0.01)
    steps, seen = 120, []
    for step in range(steps):
        model.set_progress(step / steps)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
        seen.append(model.executed_flops_fraction.item())
    assert seen[0] > 0.8  # a fresh domain's gates are open; only noise closes some
    model.eval()
    model(x)
    assert model.executed_flops_fraction.item() == pytest.approx(target, abs=0.1)


def test_noise_is_for_the_first_part_of_training():
    model = converted("a")
    model.set_domain("a")
    x = batch()

    def varies():
        return len({model.executed_flops_fraction.item() for _ in range(8) if model(x) is not None})

    model.train().set_progress(0.0)
    assert varies() > 1
    model.eval()
    assert varies() == 1
    model.train().set_progress(0.9)
    assert varies() == 1
    quiet = converted("a", config=DA3Config(adapter=ADAPTER, gate=GateConfig(noise=False)))
    quiet.set_domain("a")
    quiet.train().set_progress(0.0)
    assert torch.equal(quiet(x), quiet(x))


@pytest.mark.parametrize("change", [{"config": {}}, {"config": 3}, {"backbone": None}])
def test_a_file_that_says_too_little_is_refused(tmp_path, change):
    model = converted("a")
    path = tmp_path / "a.safetensors"
    model.save_domain("a", path)
    file = read_domain(path)
    about = {**file.metadata, **change}
    write_domain(path, file.tensors, {k: v for k, v in about.items() if v is not None})
    fresh = converted()
    with pytest.raises(CheckpointError, match="it lacks"):
        fresh.load_domain(path)
    assert fresh.domains == []


def test_an_empty_batch_executes_all_of_nothing():
    model = converted("a")
    model.set_domain("a")
    model(batch()[:0])
    assert model.executed_flops_fraction.item() == pytest.approx(1.0)
