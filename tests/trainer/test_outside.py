"""What trains beside the network belongs to the domain."""

import copy

import pytest
import torch
from helpers.apart import ALONE, PARAMETERS, Apart, assert_equal, learn, learned, scores
from helpers.lit import CONFIG, Lit, data, network, trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import nn
from torch.nn.utils import parametrizations

from lightning_da3 import (
    ConfigError,
    DA3Callback,
    DA3Config,
    DomainError,
    DomainLoader,
    InputError,
    convert,
    fit_sequence,
    load_from_checkpoint,
)
from lightning_da3.model.outside import tensors_of


def test_outputs_of_a_domain_stay_after_another_was_learned(tmp_path):
    module = Apart()
    learn(tmp_path, module, "a")
    before = scores(module, "a")
    learn(tmp_path, module, "b")
    after = scores(module, "b")
    assert not torch.equal(before, after)
    assert torch.equal(scores(module, "a"), before)
    assert torch.equal(scores(module, "b"), after)


def test_a_domain_has_parameters_and_statistics_of_what_is_outside(tmp_path):
    module = Apart()
    start = {name: p for name, p in module.named_parameters() if name in PARAMETERS}
    values = {name: p.detach().clone() for name, p in start.items()}
    learn(tmp_path, module, "a")
    assert {name for name, p in module.named_parameters() if p.requires_grad} >= PARAMETERS
    for name, parameter in start.items():  # still the user's own: others may refer to them
        assert dict(module.named_parameters())[name] is parameter
        assert not torch.equal(parameter, values[name])
    sets = learned(module, "a")
    buffers = {f"classifier.0.{k}" for k in ("running_mean", "running_var", "num_batches_tracked")}
    assert set(sets) == PARAMETERS | buffers
    assert sets["classifier.0.num_batches_tracked"] == 3
    module.net.set_domain(None)  # as they were at attach
    for name, parameter in module.named_parameters():
        assert name not in PARAMETERS or torch.equal(parameter, values[name])
    assert not any(p.requires_grad for p in module.parameters())


def test_what_a_domain_learns_depends_on_no_other(tmp_path):
    module = Apart()
    start = copy.deepcopy(module.state_dict())
    for domain in ("a", "b"):
        torch.manual_seed(2)
        learn(tmp_path, module, domain)
    alone = Apart()
    alone.load_state_dict(start)
    torch.manual_seed(2)
    learn(tmp_path, alone, "b")
    assert_equal(learned(module, "b"), learned(alone, "b"))


class Groups(Apart):
    """Another learning rate outside of the network."""

    def configure_optimizers(self):
        groups = [
            {"params": self.net.parameters()},
            {"params": [*self.classifier.parameters(), self.offset], "lr": 0.2},
            {"params": self.margin.parameters(), "lr": 0.01},
        ]
        return torch.optim.SGD(groups, 0.1, momentum=0.9, weight_decay=0.1)


@pytest.mark.parametrize("kind", [Apart, Groups])
def test_interleaved_domains_learn_what_they_learn_one_after_the_other(tmp_path, kind):
    torch.manual_seed(3)
    module = kind()
    start = copy.deepcopy(module.state_dict())
    loader = DomainLoader({"a": data(), "b": data(1)})
    both = {"a": None, "b": None}
    fitter = learn(tmp_path, module, both, loader, epochs=2)
    for domain, seed in (("a", 0), ("b", 1)):
        alone = kind()
        alone.load_state_dict(start)
        alone.net = convert(alone.net, ALONE)
        for name in both:  # adapters start alike
            alone.net.add_domain(name)
        learn(tmp_path, alone, domain, data(seed), epochs=2)
        one, other = learned(alone, domain), learned(module, domain)
        assert set(one) == set(other)
        for name in set(one) - {"offset"}:
            torch.testing.assert_close(one[name], other[name])
    groups = fitter.optimizers[0].param_groups
    if kind is Groups:
        assert [len(g["params"]) for g in groups[1:]] == [2 * 5, 2 * 1]


def test_an_interleaved_fit_resumes_bit_for_bit(tmp_path):
    def run(state, epochs, ckpt_path=None):
        torch.manual_seed(1)
        module = Groups()
        module.load_state_dict(state)
        both = {"a": None, "b": None}
        loader = DomainLoader({"a": data(), "b": data(1)})
        return module, learn(tmp_path, module, both, loader, epochs=epochs, ckpt_path=ckpt_path)

    start = copy.deepcopy(Groups().state_dict())
    whole, _ = run(start, 2)
    run(start, 1)[1].save_checkpoint(tmp_path / "half.ckpt")
    rest, _ = run(start, 2, tmp_path / "half.ckpt")
    for domain in "ab":
        assert_equal(learned(rest, domain), learned(whole, domain))


def test_a_sequence_keeps_what_is_outside(tmp_path):
    tasks = {"a": (None, data()), "b": (None, data(1))}

    def make(callbacks):
        first, *rest = callbacks
        return trainer(tmp_path, first, epochs=1, callbacks=rest, enable_checkpointing=True)

    module = fit_sequence(Apart, tasks, make, tmp_path / "domains", config=ALONE)
    expected = {name: scores(module, name) for name in "ab"}
    assert not torch.equal(expected["a"], expected["b"])
    again = fit_sequence(Apart, tasks, make, tmp_path / "domains", config=ALONE)
    for name in "ab":
        assert torch.equal(scores(again, name), expected[name])


@pytest.mark.slow
def test_a_sequence_leaves_frozen_what_is_outside(tmp_path):
    made = []

    def module():
        made.append(Apart())
        made[-1].load_state_dict(made[0].state_dict() if len(made) > 1 else {}, strict=False)
        return made[-1]

    def make(callbacks):
        first, *rest = callbacks
        return trainer(tmp_path, first, epochs=1, callbacks=rest, enable_checkpointing=True)

    def learn_all(outside):
        tasks, folder = {"a": (None, data()), "b": (None, data(1))}, tmp_path / "domains"
        return fit_sequence(module, tasks, make, folder, config=ALONE, outside=outside)

    with pytest.raises(ConfigError, match='must be "domain" or "frozen", got \'shared\''):
        learn_all("shared")
    assert not made
    for _ in range(2):  # again, from the files
        last = learn_all("frozen")
        first = {k: v for k, v in made[0].state_dict().items() if k in PARAMETERS}
        for name in "ab":
            assert not PARAMETERS & set(tensors_of(last.net.domain(name).outside))
            last.net.set_domain(name)
            assert all(torch.equal(last.state_dict()[k], v) for k, v in first.items())


def test_shared_is_said_once_and_frozen_does_not_train(tmp_path):
    module = Apart()
    with pytest.warns(UserWarning, match=r"'classifier.1.weight'.*train with every domain") as said:
        learn(tmp_path, module, "a", outside="shared")
    assert len([w for w in said if "every domain" in str(w.message)]) == 1
    before = scores(module, "a")
    with pytest.warns(UserWarning, match="train with every domain"):
        fitter = learn(tmp_path, module, "b", outside="shared")
    assert not torch.equal(scores(module, "a"), before)
    expected = {name: scores(module, name) for name in "ab"}
    fitter.save_checkpoint(tmp_path / "shared.ckpt")
    again = load_from_checkpoint(Apart, tmp_path / "shared.ckpt")
    for name in "ab":
        assert torch.equal(scores(again, name), expected[name])
    frozen = {k: v.clone() for k, v in tensors_of(module.net.shared).items()}
    learn(tmp_path, module, "c", outside="frozen")
    assert not [n for n, p in module.named_parameters() if p.requires_grad and n in PARAMETERS]
    assert_equal(frozen, dict(tensors_of(module.net.shared)))  # the statistics are c's
    for name in "ab":
        assert torch.equal(scores(module, name), expected[name])
    learn(tmp_path, module, "d")
    for name in "ab":
        assert torch.equal(scores(module, name), expected[name])
    with pytest.raises(ConfigError, match="outside='shared' is too late"):
        learn(tmp_path, module, "d", outside="shared")
    with pytest.raises(ConfigError, match="`outside` must be one of"):
        DA3Callback("a", outside="mine")


def test_a_part_that_is_replaced_is_of_the_next_domain(tmp_path):
    module = Apart()
    learn(tmp_path, module, "a")
    before = scores(module, "a")
    module.classifier[1] = nn.Linear(8, 3)
    module.offset = nn.Parameter(torch.ones(3))
    learn(tmp_path, module, "b")
    assert module(torch.ones(2, 3, 16, 16)).shape == (2, 3)
    assert torch.equal(scores(module, "a"), before)
    assert module(torch.ones(2, 3, 16, 16)).shape == (2, 2)
    module.classifier, module.offset = nn.Linear(8, 2), nn.Parameter(torch.ones(2))
    learn(tmp_path, module, "c")
    after = scores(module, "c")
    with pytest.raises(DomainError, match=r"'a' has \['classifier.0.weight', .* has no place"):
        module.net.set_domain("a")
    assert torch.equal(scores(module, "c"), after)
    module.classifier = nn.Linear(8, 2)  # c anew
    learn(tmp_path, module, "c")
    assert not torch.equal(scores(module, "c"), after)


def test_samples_of_several_domains_are_refused_where_parts_are_of_one(tmp_path):
    module = Apart()
    for name in "ab":
        learn(tmp_path, module, name)
    module.eval()
    with pytest.raises(InputError, match=r"Apart has .*'classifier.0.bias'.* of one domain at a"):
        module.net(torch.ones(2, 3, 16, 16), domains=["a", "b"])
    assert len(module.net(torch.ones(2, 3, 16, 16), domains=["a", "a"])) == 2


def test_what_no_optimizer_holds_is_said(tmp_path):
    class Forgets(Apart):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), 0.1)

    module = Forgets()
    with pytest.warns(UserWarning, match=r"No optimizer holds \[.*'offset'.* stay as they are"):
        learn(tmp_path, module, "a")


def test_a_parameter_without_a_shape_is_refused(tmp_path):
    module = Apart()
    module.classifier = nn.LazyLinear(2)
    with pytest.raises(ConfigError, match=r"'classifier.weight'.* has no shape yet"):
        learn(tmp_path, module, "a")


def test_nothing_outside_costs_nothing():
    model = convert(Apart().net, ALONE)
    model.add_domain("a")
    assert model.holder is None
    assert model.shared is None
    assert not [name for name in model.state_dict() if "shared" in name or "outside" in name]


@pytest.mark.parametrize("kind", [WeightAveraging, StochasticWeightAveraging])
def test_averages_of_domains_that_take_turns_are_each_domains_own(tmp_path, kind):
    """In their averages parameters stand in the order of the network."""
    kwargs = {"swa_lrs": 0.1, "swa_epoch_start": 1} if kind is StochasticWeightAveraging else {}
    torch.manual_seed(3)
    module = Apart()
    start = copy.deepcopy(module.state_dict())
    both, loader = {"a": None, "b": None}, DomainLoader({"a": data(), "b": data(1)})
    learn(tmp_path, module, both, loader, callbacks=[kind(**kwargs)], epochs=2)
    for name in both:
        averaged = learned(module, name)
        alone = Apart()
        alone.load_state_dict(start)
        learn(tmp_path, alone, name, data("ab".index(name)), epochs=2)
        one, other = learned(alone, name)["classifier.1.weight"], averaged["classifier.1.weight"]
        assert (one - other).norm() < (one - start["classifier.1.weight"]).norm()


class Kinds(Apart):
    """Parts that hold their parameters in ways of their own."""

    def __init__(self):
        super().__init__()
        self.memory = nn.LSTM(8, 8, batch_first=True)
        self.normed = parametrizations.weight_norm(nn.Linear(8, 8))
        self.spectral = parametrizations.spectral_norm(nn.Linear(8, 8))
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.spectral.parametrizations.weight.original
        self.listed = nn.ParameterList([torch.ones(8), torch.ones(8)])
        self.named = nn.ParameterDict({"shift": torch.zeros(8)})

    def forward(self, x):
        x = self.memory(self.net(x)[:, None])[0][:, 0]
        x = self.tied(self.spectral(self.normed(x))) * self.listed[0] + self.named["shift"]
        return self.classifier(x) * self.listed[1][:2] + self.offset


def test_parts_of_every_kind_are_switched(tmp_path):
    module = Kinds()
    learn(tmp_path, module, "a")
    before = scores(module, "a")
    names = set(tensors_of(module.net.domain("a").outside))
    assert {"memory.weight_ih_l0", "listed.1", "named.shift"} <= names
    assert "normed.parametrizations.weight.original0" in names
    module.net.save_domain("a", tmp_path / "a.safetensors")
    learn(tmp_path, module, "b")
    assert not torch.equal(scores(module, "b"), before)
    assert torch.equal(scores(module, "a"), before)
    assert module.tied.weight is module.spectral.parametrizations.weight.original
    module.net.set_domain("b")
    assert module.tied.weight is module.spectral.parametrizations.weight.original
    module.net.load_domain(tmp_path / "a.safetensors", "c")
    assert torch.equal(scores(module, "c"), before)


def test_a_head_that_is_kept_is_said(tmp_path, caplog):
    class Pooled(Lit):
        def __init__(self):
            super().__init__("later")
            self.net = network()[:-1]

    def lines():
        said = [r.getMessage() for r in caplog.records if "output layers are kept" in r.msg]
        caplog.clear()
        return said

    caplog.set_level("INFO")
    auto = DA3Config(adapter=CONFIG.adapter, gate=None)
    for _ in range(2):
        da3 = DA3Callback("a", config=auto, predict=False)
        trainer(tmp_path, da3, epochs=1).fit(Pooled(), data())
        (line,) = lines()
        assert "no single layer gives the output of Sequential" in line
    learn(tmp_path, Pooled(), "a")  # head=None
    learn(tmp_path, Apart(), "a")
    assert not lines()
    with pytest.raises(ConfigError, match=r"keep the pretrained one, frozen.*head=None"):
        trainer(tmp_path, DA3Callback("a", config=auto)).fit(Lit(), data())
