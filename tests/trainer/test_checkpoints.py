"""Checkpoints hold the domains alone, and are loaded strictly."""

import os

import lightning as L
import pytest
import torch
from helpers.doors import DOORS, EITHER, QUIET, checkpoint, through
from helpers.lit import KINDS, Lit, data, lit
from helpers.lit import parameters as domain_parameters
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_da3 import CheckpointError, load_from_checkpoint


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("weights_only", [False, True])
def test_checkpoints_hold_the_domains_alone(tmp_path, door, weights_only):
    seen = []

    class Looks(L.Callback):
        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            seen.extend(checkpoint["state_dict"])

    saver = ModelCheckpoint(dirpath=tmp_path, save_weights_only=weights_only)
    trainer = through(door, tmp_path, enable_checkpointing=True, callbacks=[saver, Looks()])
    trainer.fit(lit(), data())
    assert [key for key in seen if key.startswith("net.backbone.")] == []
    assert bool(seen) != weights_only  # a trap: these hooks are left out
    trainer.save_checkpoint(tmp_path / "after.ckpt", weights_only=weights_only)
    for path in (saver.best_model_path, tmp_path / "after.ckpt"):
        saved = torch.load(path, weights_only=True)
        assert [key for key in saved["state_dict"] if key.startswith("net.backbone.")] == []
        assert any(key.startswith("net.bank.a.") for key in saved["state_dict"])
        assert ("optimizer_states" in saved) != weights_only


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.pop("net.bank.a.head.weight"), r"lacks \['net.bank.a.head.weight'\]"),
        (lambda s: s.update({"net.bank.a.more": torch.ones(1)}), "has 'net.bank.a.more'"),
        (lambda s: s.update({"net.bank.a.head.bias": torch.ones(9)}), r"has the shape \(9,\)"),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_loading_is_strict_about_domains_whatever_strict_says(tmp_path, strict, damage, message):
    path, _ = checkpoint(tmp_path)
    content = torch.load(path, weights_only=True)
    damage(content["state_dict"])
    torch.save(content, path)
    module = lit()
    module.strict_loading = strict
    with pytest.raises(CheckpointError, match=message):
        through("callback", tmp_path).test(module, data(), ckpt_path=path, verbose=False)


def test_loading_follows_strict_about_everything_else(tmp_path):
    path, _ = checkpoint(tmp_path)

    class More(Lit):
        def __init__(self, strict):
            super().__init__()
            self.strict_loading = strict
            self.register_buffer("mean", torch.zeros(1))

    through("callback", tmp_path).test(More(False), data(), ckpt_path=path, verbose=False)
    with pytest.raises(CheckpointError, match=r"More: It lacks \['mean'\]"):
        through("callback", tmp_path).test(More(True), data(), ckpt_path=path, verbose=False)


def test_a_missing_trainable_parameter_outside_the_network_is_refused(tmp_path):
    path, _ = checkpoint(tmp_path)

    class Scaled(Lit):
        def __init__(self):
            super().__init__()
            self.strict_loading = False
            self.scale = nn.Parameter(torch.ones(1))

    with pytest.raises(CheckpointError, match=r"lacks \['scale'\]"):
        through("strategy", tmp_path).test(Scaled(), data(), ckpt_path=path, verbose=False)


@pytest.mark.parametrize("door", EITHER)
@pytest.mark.parametrize("made", KINDS)
def test_training_starts_from_a_plain_pretrained_checkpoint(tmp_path, made, door):
    donor = Lit("init")
    donor.net[1].running_mean.fill_(0.3)
    path = tmp_path / "plain.ckpt"
    plain = {"state_dict": donor.state_dict(), "pytorch-lightning_version": "2.5.0"}
    torch.save(plain, path)
    module = lit(made)
    through(door, tmp_path).test(module, data(), ckpt_path=str(path), verbose=False)
    through(door, tmp_path).fit(module, data())
    module.net.set_domain(None)
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(module.eval().net(x), donor.eval().net(x))


@pytest.mark.parametrize("door", EITHER)
def test_fit_takes_the_weights_alone_of_a_checkpoint_from_before_the_conversion(tmp_path, door):
    class Slow(Lit):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    donor = Slow()
    pretraining = L.Trainer(
        accelerator="cpu",
        max_epochs=5,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    pretraining.fit(donor, data())
    pretraining.save_checkpoint(tmp_path / "pretrained.ckpt")
    module = Slow()
    trainer = through(door, tmp_path)
    trainer.fit(module, data(), ckpt_path=tmp_path / "pretrained.ckpt")
    assert trainer.global_step == 6
    assert any(v.any() for k, v in domain_parameters(module, "a").items() if "value.weight" in k)
    module.net.set_domain(None)
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(module.eval().net(x), donor.eval().net(x))


def test_a_checkpoint_of_another_config_or_domain_is_refused(tmp_path):
    path, _ = checkpoint(tmp_path, config=QUIET)
    with pytest.raises(CheckpointError, match="Its config has gate=None, here it is"):
        through("callback", tmp_path).test(lit(), data(), ckpt_path=path)
    with pytest.raises(CheckpointError, match=r"holds the domains \['a'\] and not \['b'\]"):
        through("callback", tmp_path, "b", config=QUIET).test(lit(), data(), ckpt_path=path)


def test_optimizer_states_of_another_domain_are_refused(tmp_path):
    saver = ModelCheckpoint(dirpath=tmp_path)
    module = lit()
    through("callback", tmp_path, "a").fit(module, data())
    later = through("callback", tmp_path, "b", enable_checkpointing=True, callbacks=[saver])
    later.fit(module, data())
    again = through("callback", tmp_path, "a", epochs=3)
    with pytest.raises(CheckpointError, match=r"while \['DA3Callback\[b\]'\] trained"):
        again.fit(lit(), data(), ckpt_path=saver.best_model_path)
    tester = through("callback", tmp_path, "a")
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint"):
        tester.test(lit(), data(), ckpt_path=saver.best_model_path, verbose=False)


def without(name):
    return lambda content: {key: value for key, value in content.items() if key != name}


def changed(**parts):
    return lambda content: {**content, **parts}


BAD = {
    "empty": lambda _: {},
    "a list": lambda _: [],
    "a number": lambda _: 3,
    "no state": without("state_dict"),
    "empty state": changed(state_dict={}),
    "state of another type": changed(state_dict=[1]),
    "no names": changed(state_dict={1: torch.ones(1)}),
    "nothing of the network": changed(state_dict={"x": torch.ones(1)}),
    "no version": without("pytorch-lightning_version"),
    "callbacks of another type": changed(callbacks=3),
    "loops of another type": changed(loops=3),
    "optimizers of another type": changed(optimizer_states=3),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path, _ = checkpoint(tmp_path_factory.mktemp("good"))
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("damage", BAD)
@pytest.mark.slow
def test_what_is_no_checkpoint(tmp_path, good, damage):
    path = tmp_path / "bad.ckpt"
    torch.save(BAD[damage](good), path)
    message = "no checkpoint that a Trainer can load|holds nothing of the network|holds no domain"
    with pytest.raises(CheckpointError, match=message):
        through("callback", tmp_path).fit(lit(), data(), ckpt_path=path)
    with pytest.raises(CheckpointError, match=message):
        through("strategy", tmp_path).test(lit(), data(), ckpt_path=path)
    if not damage.endswith("s of another type"):  # which only a Trainer needs
        with pytest.raises(CheckpointError, match=message):
            load_from_checkpoint(Lit, path)


@pytest.mark.parametrize("door", EITHER)
def test_a_checkpoint_that_does_not_fit_leaves_everything_as_it_was(tmp_path, good, door):
    class More(Lit):
        def __init__(self):
            super().__init__()
            self.scale, self.zoom = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(3))

    state = {**good["state_dict"], "scale": torch.zeros(1), "zoom": torch.zeros(2)}
    torch.save({**good, "state_dict": state}, tmp_path / "bad.ckpt")
    module = More()
    runner = through(door, tmp_path)
    with pytest.raises(CheckpointError, match="does not fit More"):
        runner.test(module, data(), ckpt_path=tmp_path / "bad.ckpt")
    assert module.scale.item() == 1
    values = [v for k, v in domain_parameters(module, "a").items() if "value.weight" in k]
    assert values
    assert not any(value.any() for value in values)  # a fresh domain's


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("door", EITHER)
def test_a_checkpoint_that_is_a_pipe_is_not_waited_for(tmp_path, door):
    os.mkfifo(tmp_path / "pipe.ckpt")
    with pytest.raises(CheckpointError, match=r"Cannot read the checkpoint .*no regular file"):
        through(door, tmp_path).fit(lit(), data(), ckpt_path=tmp_path / "pipe.ckpt")
    with pytest.raises(CheckpointError, match=r"Cannot read the checkpoint .*no regular file"):
        load_from_checkpoint(Lit, tmp_path / "pipe.ckpt")


@pytest.mark.parametrize(
    "change",
    [{"num_classes": {"a": 10**9}}, {"num_classes": 3}, {"config": 3}, {"active": "z"}],
    ids=["huge", "no classes", "no config", "unknown"],
)
def test_what_a_checkpoint_says_is_not_believed(tmp_path, good, change):
    name = "net._extra_state"
    extra = {**good["state_dict"][name], **change}
    path = tmp_path / "bad.ckpt"
    torch.save({**good, "state_dict": {**good["state_dict"], name: extra}}, path)
    module = lit()
    with pytest.raises(CheckpointError):
        through("callback", tmp_path).fit(module, data(), ckpt_path=path)
    with pytest.raises(CheckpointError):
        load_from_checkpoint(Lit, path)
