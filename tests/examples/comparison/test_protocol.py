"""The comparison itself on a small network: its stages, and that it goes on where it stopped."""

import copy
import dataclasses
import math

import pytest
import torch
from helpers.blocks import small_net
from helpers.images import write_domain
from torch import nn

METHODS = ["fine-tuning", "checkpointing", "linear probe", "Piggyback"]
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*in eval mode at the start of training", "ignore:The number of training batches"
)


def prepared(folder, methods=METHODS, domains=("a", "b"), seeds=1, rates=2, said=None, epochs=2):
    """A comparison of two domains of four images a class."""
    from comparison.backbones import Backbone
    from comparison.images import folders
    from comparison.protocol import Comparison
    from comparison.records import Records
    from comparison.training import Schedule

    for name in domains:
        if not (folder / "data" / name).exists():
            write_domain(folder / "data" / name)
    backbone = Backbone("small", small_net, (0.5,) * 3, (0.5,) * 3)
    return Comparison(
        backbone=backbone,
        source=("small", None, 16),
        domains=folders(folder / "data", backbone, 16),
        methods=methods,
        seeds=seeds,
        schedule=Schedule(epochs, 4),
        rounds=1,
        most_rates=rates,
        records=Records(folder / "finished.jsonl", {}),
        folder=folder,
        say=([] if said is None else said).append,
    )


@pytest.fixture(autouse=True)
def _here(monkeypatch):
    """Costs are measured in this process, of this network."""
    from comparison.backbones import Backbone

    monkeypatch.setattr("comparison.protocol.apart", lambda function, *args: function(*args))
    backbone = Backbone("small", small_net, (0.5,) * 3, (0.5,) * 3)
    monkeypatch.setattr("comparison.costs.load_backbone", lambda *_: backbone)


def keys(comparison, stage):
    return [key for key in comparison.records._done if key[0] == stage]


@pytest.mark.slow
def test_every_stage_of_every_method(tmp_path):
    said = []
    comparison = prepared(tmp_path, seeds=2, said=said)
    comparison.run()
    learns = METHODS[:1] + METHODS[2:]  # checkpointing learns what fine-tuning learns
    assert len(keys(comparison, "rate")) == len(learns) * 2 * 2
    assert len(keys(comparison, "learn")) == len(learns) * 2 * 2
    assert keys(comparison, "forget") == [("forget", m, "a, b") for m in learns]
    assert keys(comparison, "cost") == [("cost", m) for m in METHODS]
    learned = comparison.records["learn", "linear probe", "a", "0"]
    assert learned["stored_parameters"] == 16 * 2 + 2
    assert learned["stored_bytes"] == 4 * learned["stored_parameters"]
    assert len(learned["curve"]) == 2
    assert learned["curve"][-1] == pytest.approx(learned["accuracy"])
    assert (learned["steps"], learned["test_images"]) == (2, 4)
    tuned = comparison.records["learn", "fine-tuning", "a", "0"]
    assert tuned["stored_parameters"] > sum(p.numel() for p in small_net(2).parameters())
    assert any("11/" in line and "s left" in line for line in said)


def test_masks_are_stored_as_bits():
    from comparison.protocol import stored_bytes

    state = {"a.mask": torch.zeros(9), "head": torch.zeros(2)}
    assert stored_bytes(state, ".mask") == 2 + 8
    assert stored_bytes(state, None) == 36 + 8


def test_it_goes_on_where_it_stopped(tmp_path, monkeypatch):
    import comparison.protocol as protocol

    calls = []

    def learn(*arguments):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(arguments)
        return whole(*arguments)

    whole = protocol.learn
    first = prepared(tmp_path, ["linear probe"])
    with monkeypatch.context() as patch:
        patch.setattr(protocol, "learn", learn)
        with pytest.raises(KeyboardInterrupt):
            first.run()
    assert len(first.records) == 3
    second = prepared(tmp_path, ["linear probe"])
    again = []
    monkeypatch.setattr(protocol, "learn", lambda *a: again.append(a) or whole(*a))
    second.run()
    assert len(again) == 3  # of six
    uninterrupted = prepared(tmp_path / "other", ["linear probe"])
    uninterrupted.run()
    for key in (*keys(second, "rate"), *keys(second, "learn"), *keys(second, "forget")):
        assert second.records[key] == uninterrupted.records[key], key


def test_a_state_that_was_removed_is_learned_again(tmp_path):
    comparison = prepared(tmp_path, ["linear probe"])
    comparison.run()
    path = comparison.state_path("linear probe", "a", "0")
    path.unlink()
    again = prepared(tmp_path, ["linear probe"])
    again.run()
    assert path.exists()


@pytest.mark.slow
def test_methods_and_seeds_are_added_to_what_is_finished(tmp_path):
    prepared(tmp_path, ["linear probe"]).run()
    said = []
    more = prepared(tmp_path, ["linear probe", "biases only"], seeds=2, said=said)
    more.run()
    probes = [line for line in said if "learn, linear probe" in line]
    assert [line.split(":")[0].split(", ")[-1] for line in probes] == ["1", "1"]  # the second seed


def test_rates_are_chosen_by_validation_images_and_then_by_loss(tmp_path):
    comparison = prepared(tmp_path, ["linear probe"], rates=3)
    for rate, accuracy, loss in ((3e-3, 0.5, 1.0), (1e-2, 0.75, 2.0), (3e-2, 0.75, 1.5)):
        key = ("rate", "linear probe", "a", f"{rate:g}")
        comparison.records.add(key, {"accuracy": accuracy, "loss": loss})
    assert comparison.rate("linear probe", "a") == 3e-2


def _tell(comparison, rate, accuracy, domain="a"):
    key = ("rate", "linear probe", domain, f"{rate:g}")
    comparison.records.add(key, {"accuracy": accuracy, "loss": 1.0})


def test_what_was_learned_at_a_rate_that_is_no_longer_best_is_learned_again(tmp_path):
    comparison = prepared(tmp_path, ["linear probe"], rates=3, epochs=1)
    for domain in ("a", "b"):
        for rate, accuracy in ((3e-3, 0.5), (1e-2, 0.6), (3e-2, 0.7)):
            _tell(comparison, rate, accuracy, domain)
    comparison.run()
    assert comparison.records["learn", "linear probe", "a", "0"]["rate"] == 3e-2
    said = []
    more = prepared(tmp_path, ["linear probe"], rates=5, said=said, epochs=1)
    _tell(more, 1e-1, 0.9)
    _tell(more, 3e-1, 0.0)
    _tell(more, 1e-1, 0.0, "b")
    more.run()
    assert more.records["learn", "linear probe", "a", "0"]["rate"] == 1e-1
    assert [line.split(":")[0].split(maxsplit=1)[1] for line in said] == [
        "learn, linear probe, a, 0",
        "forget, linear probe, a, b",
    ]


def test_test_images_choose_nothing(tmp_path, monkeypatch):
    import comparison.protocol as protocol

    tested = []
    whole = protocol.evaluate
    monkeypatch.setattr(protocol, "evaluate", lambda n, d: tested.append(d) or whole(n, d))
    comparison = prepared(tmp_path, ["linear probe"], domains=("a",))
    comparison.run()
    *chosen, last = tested
    assert [len(part) for part in chosen] == [2, 2]
    assert all(part.dataset is comparison.domains[0].plain for part in chosen)
    assert last is comparison.domains[0].test


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_rate_at_which_the_loss_is_not_finite_loses(tmp_path, monkeypatch, value):
    import comparison.protocol as protocol

    monkeypatch.setattr(protocol, "evaluate", lambda *_: (0.5, value))
    comparison = prepared(tmp_path, ["linear probe"])
    assert comparison._try("linear probe", comparison.domains[0], 1e-2)["loss"] == 1e9


def test_da3_that_stops_at_a_rate_is_said_and_the_rate_loses(tmp_path, monkeypatch):
    import comparison.protocol as protocol

    from lightning_da3 import DA3Error

    def learn(*_):
        raise DA3Error("The loss is nan.")

    monkeypatch.setattr(protocol, "learn", learn)
    said = []
    comparison = prepared(tmp_path, ["DA3"], said=said)
    assert comparison._try("DA3", comparison.domains[0], 1.0) == {"accuracy": 0.0, "loss": 1e9}
    assert said == ["DA3 does not learn a at 1: The loss is nan."]


def test_fine_tuning_in_a_row_goes_on_from_the_network_of_the_domain_before(tmp_path, monkeypatch):
    import comparison.protocol as protocol

    comparison = prepared(tmp_path, ["fine-tuning"], rates=1, epochs=1)
    comparison.run()
    state = torch.load(comparison.state_path("fine-tuning", "a", "0"), weights_only=True)
    seen, whole = [], protocol.learn_on

    def learn_on(method, network, domain, *others):
        same = {
            n: torch.equal(v, state[n])
            for n, v in network.state_dict().items()
            if n in state and state[n].shape == v.shape
        }
        seen.append((domain.name, {n.split(".")[0] for n, equal in same.items() if not equal}))
        return whole(method, network, domain, *others)

    monkeypatch.setattr(protocol, "learn_on", learn_on)
    heads = []
    backbone = comparison.backbone
    with_head = type(backbone).with_head

    def noted(self, classes):
        network = with_head(self, classes)
        heads.append(network.classifier.weight.detach().clone())
        return network

    monkeypatch.setattr(type(backbone), "with_head", noted)
    assert comparison._in_a_row("fine-tuning").keys() == {"a"}
    assert seen == [("b", {"classifier"})]  # a fresh head
    torch.rand(7)  # another piece of work ran before
    comparison._in_a_row("fine-tuning")
    assert torch.equal(heads[1], heads[3])


def test_states_put_back_forget_nothing(tmp_path):
    comparison = prepared(tmp_path, ["biases only"], rates=1, epochs=1)
    comparison.run()
    kept = comparison.records["forget", "biases only", "a, b"]
    assert (kept["forgetting"], kept["by_domain"]) == (0.0, {"a": 0.0})


def test_a_state_of_another_network(tmp_path):
    from comparison.input_errors import InputError

    comparison = prepared(tmp_path, ["linear probe"])
    comparison._write({"other": torch.zeros(1)}, comparison.state_path("linear probe", "a", "0"))
    with pytest.raises(InputError, match="of another network: begin anew with --fresh"):
        comparison._put_back("linear probe")


@pytest.mark.parametrize("name", ["DA3", "DA3 gates", "TinyTL", "series adapters", "LoRA"])
def test_a_domains_state_is_all_that_it_needs(tmp_path, name):
    from comparison.methods import METHODS as KNOWN
    from comparison.training import learn, ready

    if name == "LoRA":
        pytest.importorskip("peft")
    comparison = prepared(tmp_path, [name], domains=("a",), epochs=1)
    arguments = KNOWN[name], comparison.backbone, comparison.domains[0], KNOWN[name].rates[1]
    learned = learn(*arguments, 0, comparison.schedule)
    fresh = KNOWN[name].build(comparison.backbone.with_head(2))
    fresh.load_state_dict(learned.state, strict=False)
    images = torch.stack([x for x, _ in comparison.domains[0].test])
    images = images.contiguous(memory_format=torch.channels_last)
    fresh = ready(fresh.to(memory_format=torch.channels_last))
    with torch.no_grad():
        torch.testing.assert_close(fresh(images), learned.network(images))
    backbone = {n: p for n, p in small_net().named_parameters() if "classifier" not in n}
    if name.startswith("DA3"):
        assert sum(v.numel() for v in learned.state.values()) < sum(
            map(torch.numel, backbone.values())
        )


class Residual(nn.Module):
    """Two branches that can be skipped, of equal cost."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 4, padding=1)
        self.one = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
        self.classifier = nn.Linear(16, 3)

    def forward(self, x):
        x = self.stem(x).relu()
        x = x + self.one(x)
        x = x + self.two(x)
        return self.classifier(x.mean((2, 3)))


@pytest.mark.slow
def test_domains_that_skip_branches(tmp_path, monkeypatch):
    from comparison.backbones import Backbone

    torch.manual_seed(0)
    pretrained = Residual()
    backbone = Backbone("residual", lambda: copy.deepcopy(pretrained), (0.5,) * 3, (0.5,) * 3)
    monkeypatch.setattr("comparison.costs.load_backbone", lambda *_: backbone)
    name = "DA3 65% of FLOPs"
    comparison = prepared(tmp_path, ["DA3", name], rates=1)
    comparison = dataclasses.replace(comparison, backbone=backbone)
    comparison.run()
    learned = [comparison.records["learn", name, domain, "0"] for domain in ("a", "b")]
    assert all(each["skipped"] in (["one.0"], ["two.0"]) for each in learned)
    assert comparison.records["learn", "DA3", "a", "0"]["skipped"] == []
    assert comparison.records["forget", name, "a, b"]["forgetting"] == 0
    whole, smaller = (comparison.records["cost", method] for method in ("DA3", name))
    assert smaller["step_flops"] < 0.75 * whole["step_flops"]


@pytest.mark.slow
def test_costs_of_methods(tmp_path):
    from comparison.costs import measure

    names = ["fine-tuning", "checkpointing", "linear probe", "DA3"]
    paid = measure(("small", None, 16), dict.fromkeys(names), 3, 4, 1)
    assert list(paid) == names
    kept = {name: values["kept_bytes"] for name, values in paid.items()}
    assert kept["linear probe"] < kept["DA3"] < kept["checkpointing"] < kept["fine-tuning"]
    flops = {name: values["step_flops"] for name, values in paid.items()}
    assert flops["linear probe"] < flops["fine-tuning"] < flops["checkpointing"]
    assert all(v > 0 for values in paid.values() for v in values.values())
