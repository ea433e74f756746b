"""What trains beside the network, in files, checkpoints and copies."""

import copy
import pickle

import pytest
import torch
from helpers.apart import ALONE, PARAMETERS, Apart, assert_equal, learn, learned, scores
from helpers.lit import data, trainer
from torch import nn

from lightning_da3 import (
    CheckpointError,
    DA3Callback,
    DomainError,
    convert,
    load_from_checkpoint,
)
from lightning_da3.model.outside import tensors_of


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
