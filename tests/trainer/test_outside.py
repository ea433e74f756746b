"""What trains beside the network belongs to the domain."""

import copy
import pickle

import pytest
import torch
from helpers.apart import PARAMETERS, Apart, scores
from helpers.lit import CONFIG, data, trainer
from torch import nn

from lightning_da3 import (
    CheckpointError,
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

ALONE = DA3Config(adapter=CONFIG.adapter, gate=None, head=None)


def learn(tmp_path, module, domain, loader=None, callbacks=(), epochs=1, ckpt_path=None, **kwargs):
    da3 = DA3Callback(domain, config=ALONE, predict=False, **kwargs)
    fitter = trainer(tmp_path, da3, epochs=epochs, callbacks=list(callbacks))
    fitter.fit(module, loader or data(sum(map(ord, domain))), ckpt_path=ckpt_path)
    return fitter


def learned(module, domain):
    """The set of a domain, copied."""
    module.net.refresh()
    return {k: v.clone() for k, v in tensors_of(module.net.domain(domain).outside).items()}


def assert_equal(one, other):
    assert set(one) == set(other)
    assert not [name for name in one if not torch.equal(one[name], other[name])]


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


def test_files_restore_what_is_outside_bit_for_bit(tmp_path):
    module = Apart()
    learn(tmp_path, module, "a", save_dir=str(tmp_path))
    expected = scores(module, "a")
    learn(tmp_path, module, "b")
    module.net.load_domain(tmp_path / "a.safetensors", "again")
    assert torch.equal(scores(module, "again"), expected)
    module.net.delete_domain("a")
    assert module.net.load_domain(tmp_path / "a.safetensors") == "a"
    assert torch.equal(scores(module, "a"), expected)
    other = Apart()  # a network that is converted by hand, and then put into a module
    other.net = convert(other.net, ALONE)
    other.net.load_domain(tmp_path / "a.safetensors")
    trainer(tmp_path, DA3Callback("a", config=ALONE)).test(other, data(), verbose=False)
    assert torch.equal(scores(other, "a"), expected)
    assert {name for name, p in other.named_parameters() if p.requires_grad} >= PARAMETERS


def test_shapes_are_checked_on_loading(tmp_path):
    module = Apart()
    learn(tmp_path, module, "a")
    module.net.save_domain("a", tmp_path / "a.safetensors")
    other = Apart()
    other.classifier[1] = nn.Linear(8, 3)
    other.offset = nn.Parameter(torch.zeros(3))
    learn(tmp_path, other, "b")
    before = other.net.domains
    with pytest.raises(CheckpointError, match=r"'outside.classifier.1.weight' has the shape \(2, "):
        other.net.load_domain(tmp_path / "a.safetensors")
    assert other.net.domains == before
    del other.margin
    other.net.set_domain(None)
    plain = convert(Apart().net, ALONE)
    plain.load_domain(tmp_path / "a.safetensors")
    lacking = Apart()
    lacking.net = plain
    del lacking.margin
    with pytest.raises(DomainError, match=r"\['margin.scale'\] outside of the network, for which"):
        trainer(tmp_path, DA3Callback("a", config=ALONE)).test(lacking, data(), verbose=False)


def test_files_of_before_start_as_it_was_at_attach(tmp_path):
    inside = convert(Apart().net, ALONE)
    inside.add_domain("old")
    inside.save_domain("old", tmp_path / "old.safetensors")
    module = Apart()
    start = {name: p.detach().clone() for name, p in module.named_parameters()}
    learn(tmp_path, module, "a")
    module.net.load_domain(tmp_path / "old.safetensors")
    sets = learned(module, "old")
    assert set(sets) >= PARAMETERS
    assert not [n for n in PARAMETERS if not torch.equal(sets[n], start[n])]


def test_checkpoints_resume_bit_for_bit(tmp_path):
    whole = Apart()
    torch.manual_seed(1)
    start = copy.deepcopy(whole.state_dict())
    learn(tmp_path, whole, "a", data(), epochs=2)
    half = Apart()
    half.load_state_dict(start)
    torch.manual_seed(1)
    learn(tmp_path, half, "a", data()).save_checkpoint(tmp_path / "half.ckpt")
    rest = Apart()
    with torch.no_grad():
        rest.classifier[1].weight.fill_(7.0)
    learn(tmp_path, rest, "a", data(), epochs=2, ckpt_path=tmp_path / "half.ckpt")
    assert_equal(learned(rest, "a"), learned(whole, "a"))


@pytest.mark.parametrize("active", ["a", "b", None])
def test_checkpoints_hold_the_sets_of_every_domain(tmp_path, active):
    module = Apart()
    learn(tmp_path, module, "a")
    fitter = learn(tmp_path, module, "b")
    expected = {name: scores(module, name) for name in ("a", "b", None)}
    module.net.set_domain(active)
    fitter.save_checkpoint(tmp_path / "both.ckpt")
    again = load_from_checkpoint(Apart, tmp_path / "both.ckpt")
    assert again.net.active_domain == active
    for name in ("a", "b", None):
        assert torch.equal(scores(again, name), expected[name])
    state = module.state_dict()
    for name in ("a", None, "b"):  # whatever is active when it is loaded
        again.net.set_domain(name)
        for parameter in again.parameters():
            parameter.data.mul_(1.5)
        again.load_state_dict(state)
        for other in ("a", "b", None):
            assert torch.equal(scores(again, other), expected[other])


def test_checkpoints_of_before_have_one_set_for_all(tmp_path):
    module = Apart()
    fitter = learn(tmp_path, module, "a")
    expected = scores(module, "a")
    fitter.save_checkpoint(tmp_path / "new.ckpt")
    checkpoint = torch.load(tmp_path / "new.ckpt", weights_only=True)
    state = checkpoint["state_dict"]
    for name in [name for name in state if ".outside." in name or ".shared." in name]:
        del state[name]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    again = load_from_checkpoint(Apart, tmp_path / "old.ckpt")
    assert torch.equal(scores(again, "a"), expected)
    resumed = Apart()
    learn(tmp_path, resumed, "a", ckpt_path=tmp_path / "old.ckpt")
    assert torch.equal(scores(resumed, "a"), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_switch_what_is_theirs(tmp_path, copied):
    module = Apart()
    learn(tmp_path, module, "a")
    learn(tmp_path, module, "b")
    module.trainer = None
    expected = {name: scores(module, name) for name in ("a", "b", None)}
    twin = copied(module)
    for parameter in module.parameters():
        parameter.data.zero_()
    for name in ("b", "a", None, "b"):
        assert torch.equal(scores(twin, name), expected[name])
    alone = copied(twin.net)  # the network alone has the sets and switches nothing
    assert set(learned(twin, "a")) == set(tensors_of(alone.domain("a").outside))
    alone.save_domain("b", tmp_path / "b.safetensors")
    alone.set_domain("a")
    assert torch.equal(scores(twin, "b"), expected["b"])
    twin.net.load_domain(tmp_path / "b.safetensors", "c")
    assert torch.equal(scores(twin, "c"), expected["b"])


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


def test_frozen_parts_losses_and_masks_are_in_no_file(tmp_path):
    module = Apart()
    module.teacher = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).requires_grad_(False)
    module.register_buffer("mask", torch.full((2,), -torch.inf))
    module.register_buffer("queue", torch.zeros(2))
    module.register_buffer("lost", torch.zeros(2), persistent=False)
    module.criterion = nn.CrossEntropyLoss(torch.ones(2))
    module.norm = nn.BatchNorm1d(2, affine=False)
    learn(tmp_path, module, "a")
    names = {name.partition(".")[0] for name in learned(module, "a")}
    assert names == {"classifier", "margin", "offset", "queue", "norm"}


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
