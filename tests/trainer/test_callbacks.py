"""DA3Callback in real Trainers, on tiny networks made at every point where users make them."""

import pickle
import sys
import warnings

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from helpers.lit import (
    CONFIG,
    KINDS,
    Lit,
    callback,
    data,
    lit,
    logits,
    network,
    parameters,
    trainer,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_da3 import (
    CheckpointError,
    ConfigError,
    ConversionError,
    DA3Callback,
    DA3Config,
    DA3Error,
    DA3Model,
    convert,
)


@pytest.mark.parametrize("made", KINDS)
@pytest.mark.slow
def test_fit_test_resume_and_a_second_domain(tmp_path, made):
    module = lit(made)
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "checkpoints")
    first = trainer(tmp_path, callback(), enable_checkpointing=True, callbacks=[checkpoint])
    first.fit(module, data())
    assert isinstance(module.net, DA3Model)
    assert first.global_step == 6
    learned = logits(module, "a")
    fresh = parameters(module, "a")
    assert any(v.any() for k, v in fresh.items() if "value.weight" in k)  # it did train

    trainer(tmp_path, callback("b", 3)).fit(module, data(1))
    assert module.net.domains == ["a", "b"]
    assert torch.equal(logits(module, "a"), learned)

    other = lit(made)  # a new process, say
    tester = trainer(tmp_path, callback())
    (metrics,) = tester.test(other, data(), ckpt_path=checkpoint.best_model_path, verbose=False)
    assert torch.equal(logits(other, "a"), learned)
    assert 0.0 <= metrics["accuracy"] <= 1.0

    resumed = lit(made)
    longer = trainer(tmp_path, callback(), epochs=3)
    longer.fit(resumed, data(), ckpt_path=checkpoint.best_model_path)
    assert longer.global_step == 9


def test_resume_goes_on_where_an_uninterrupted_run_would(tmp_path):
    config = DA3Config(adapter=CONFIG.adapter, gate=None)  # gate noise is random

    def run(epochs, ckpt_path=None, module=None):
        module = module or lit()
        folder = tmp_path / f"{epochs}{'r' if ckpt_path else ''}"
        saver = ModelCheckpoint(dirpath=folder)
        torch.manual_seed(1)  # of the fresh adapters
        fitter = trainer(
            tmp_path,
            DA3Callback("a", 2, config=config),
            epochs,
            enable_checkpointing=True,
            callbacks=[saver],
        )
        fitter.fit(module, data(), ckpt_path=ckpt_path)
        return module, saver.best_model_path

    whole, _ = run(2)
    _, path = run(1)
    resumed, _ = run(2, ckpt_path=path)
    for name, value in parameters(whole, "a").items():
        assert torch.equal(parameters(resumed, "a")[name], value), name


@pytest.mark.parametrize("weights_only", [False, True])
def test_checkpoints_hold_the_domains_alone(tmp_path, weights_only):
    saver = ModelCheckpoint(dirpath=tmp_path, save_weights_only=weights_only)
    module = lit()
    trainer(tmp_path, callback(), enable_checkpointing=True, callbacks=[saver]).fit(module, data())
    state = torch.load(saver.best_model_path, weights_only=True)["state_dict"]
    assert [key for key in state if key.startswith("net.backbone.")] == []
    assert any(key.startswith("net.bank.a.") for key in state)


def test_a_checkpoint_of_another_backbone_is_refused(tmp_path):
    saver = ModelCheckpoint(dirpath=tmp_path)
    trainer(tmp_path, callback(), enable_checkpointing=True, callbacks=[saver]).fit(lit(), data())
    other = lit()
    nn.init.ones_(other.net[0].weight)
    with pytest.raises(CheckpointError, match="another backbone"):
        trainer(tmp_path, callback()).test(other, data(), ckpt_path=saver.best_model_path)


def test_a_plain_pretrained_checkpoint_loads_into_the_backbone(tmp_path):
    donor = lit()
    donor.net[1].running_mean.fill_(0.3)
    path = tmp_path / "plain.ckpt"
    torch.save({"state_dict": donor.state_dict(), "pytorch-lightning_version": "2.5.0"}, path)
    module = lit()
    trainer(tmp_path, callback()).test(module, data(), ckpt_path=str(path), verbose=False)
    module.net.set_domain(None)
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(module.eval().net(x), donor.eval().net(x))


def test_only_the_domain_trains(tmp_path):
    module = lit()
    before = [v.clone() for v in convert(module.net, CONFIG).backbone.state_dict().values()]
    trainer(tmp_path, callback()).fit(module, data())
    after = list(module.net.backbone.state_dict().values())
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert [k for k, v in module.named_parameters() if v.requires_grad] == [
        k for k, _ in module.named_parameters() if ".bank.a." in k
    ]


def test_what_is_logged(tmp_path):
    fitter = trainer(tmp_path, callback())
    fitter.fit(lit(), data())
    logged = fitter.callback_metrics
    assert 0 < logged["da3/saved_activation_bytes"] < logged["da3/peak_bytes"]
    assert 0 < logged["da3/executed_flops_fraction"] <= 1
    plain = DA3Callback("a", 2, DA3Config(adapter=CONFIG.adapter, gate=None))
    fitter = trainer(tmp_path, plain)
    fitter.fit(module := lit(), data())
    assert module.net.executed_flops_fraction == 1.0
    assert set(logged) - set(fitter.callback_metrics) == {"da3/executed_flops_fraction"}


def test_the_domain_is_saved_and_loads_bit_identically(tmp_path):
    module = lit()
    trainer(tmp_path, callback(save_dir=str(tmp_path / "domains"))).fit(module, data())
    model = convert(network(), CONFIG)
    assert model.load_domain(tmp_path / "domains" / "a.safetensors") == "a"
    again = Lit("elsewhere")
    again.net = model
    assert torch.equal(logits(again, "a"), logits(module, "a"))


def test_nan_stops_training_and_keeps_the_last_good_state(tmp_path):
    good = callback(save_dir=str(tmp_path))
    trainer(tmp_path, good).fit(lit(), data())
    content = good.path.read_bytes()
    with pytest.raises(DA3Error, match="loss of domain 'a' is nan") as caught:
        trainer(tmp_path, callback(save_dir=str(tmp_path))).fit(lit(), data(nan=True))
    assert str(good.path) in str(caught.value)
    assert good.path.read_bytes() == content


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_precisions_accumulation_and_clipping(tmp_path, precision):
    module = lit()
    scales = []

    class Notes(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            scales.append(pl_module.net.gate_loss_scale)

    fitter = trainer(
        tmp_path,
        callback(),
        callbacks=[Notes()],
        precision=precision,
        accumulate_grad_batches=3,
        gradient_clip_val=0.5,
    )
    fitter.fit(module, data())
    assert scales == pytest.approx([1 / 3] * len(scales))
    assert module.net.gate_loss_scale is None  # whoever trains it next may do otherwise
    assert all(v.isfinite().all() for v in parameters(module, "a").values())


class Manual(Lit):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        x, y = batch
        F.cross_entropy(self.net(x), y).backward()  # Lightning is not told
        optimizer.step()


def test_manual_optimization_leaves_no_hooks_behind(tmp_path):
    fitter = trainer(tmp_path, callback())
    fitter.fit(Manual(), data())
    assert "da3/saved_activation_bytes" not in fitter.callback_metrics
    assert fitter.callback_metrics["da3/peak_bytes"] > 0


def test_the_callback_needs_to_be_told_only_what_it_cannot_know(tmp_path):
    class Two(Lit):
        def __init__(self):
            super().__init__()
            self.teacher = network()[:-1]

    with pytest.raises(ConfigError, match=r"These have convolutions .*: 'net' \(869\), 'teacher'"):
        trainer(tmp_path, callback()).fit(Two(), data())
    trainer(tmp_path, callback(backbone="net")).fit(Two(), data())
    with pytest.raises(ConfigError, match="no submodule 'nett'"):
        trainer(tmp_path, callback(backbone="nett")).fit(Two(), data())


def test_bad_arguments_leave_the_module_as_it_was(tmp_path):
    module = lit()
    original = module.net
    with pytest.raises(ConfigError, match="`num_classes` is missing"):
        trainer(tmp_path, DA3Callback("a", config=CONFIG)).fit(module, data())
    headless = DA3Config(head="fc")
    with pytest.raises(ConversionError, match="no Linear or convolution named 'fc'"):
        trainer(tmp_path, DA3Callback("a", 2, config=headless)).fit(module, data())
    assert module.net is original
    assert all(p.requires_grad for p in module.parameters())


def test_contradicting_callbacks_are_refused(tmp_path):
    module = lit()
    trainer(tmp_path, callback()).fit(module, data())
    with pytest.raises(ConfigError, match="has 2 classes already, got num_classes=7"):
        trainer(tmp_path, callback("a", 7)).fit(module, data())
    with pytest.raises(ConversionError, match="give every DA3Callback the same config"):
        trainer(tmp_path, DA3Callback("b", 2)).fit(module, data())


def test_an_unwritable_folder_is_a_clear_error(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(CheckpointError, match="Cannot make the folder"):
        trainer(tmp_path, callback(save_dir=str(blocked))).fit(lit(), data())


def test_a_module_that_comes_in_eval_trains_its_domain_all_the_same(tmp_path):
    module = lit().eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found .* in eval mode")  # Lightning's, and right
        trainer(tmp_path, callback()).fit(module, data())
    assert module.net.domain("a").training


def test_a_pickled_callback_leaves_the_network_to_the_module(tmp_path):
    used = callback()
    trainer(tmp_path, used).fit(lit(), data())
    assert used.model is not None
    again = pickle.loads(pickle.dumps(used))
    assert again.model is None
    module = lit()
    trainer(tmp_path, again).fit(module, data())
    assert again.model is module.net


def test_state_key_tells_domains_apart():
    assert callback("a").state_key != callback("b").state_key


def test_no_warning_of_ours(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(tmp_path, callback()).fit(lit(), data())
    assert [w for w in caught if "lightning_da3" in w.filename] == []


def test_a_step_of_the_module_s_own_may_scale_its_loss(tmp_path):
    scales = []

    class Scaled(Manual):
        def on_train_batch_end(self, *_):
            scales.append(self.net.gate_loss_scale)

    module = Scaled()
    trainer(tmp_path, callback()).fit(module, data())
    assert set(scales) == {None}
    assert module.net.domain("a").loss_unit.value > 0


def test_a_step_without_an_active_domain_says_so(tmp_path):
    class Alone(Lit):
        def training_step(self, batch, batch_idx):
            self.net.set_domain(None)
            return super().training_step(batch, batch_idx)

    class Detached(Lit):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx).detach()

    with pytest.raises(DA3Error, match=r"no domain is active.*set_domain\(name\).*\['a'\]"):
        trainer(tmp_path, callback()).fit(Alone(), data())
    with pytest.raises(DA3Error, match=r"though domain 'a' is active: .* detaches its output"):
        trainer(tmp_path, callback()).fit(Detached(), data())


@pytest.mark.skipif(sys.version_info < (3, 11), reason="errors take no notes")
def test_targets_that_are_no_class_are_explained(tmp_path):
    class Beyond(Lit):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch[0], batch[1] + 5), batch_idx)

    with pytest.raises(IndexError, match="out of bounds") as caught:
        trainer(tmp_path, callback()).fit(Beyond(), data())
    assert "num_classes=2, so that its targets must be 0 to 1" in str(caught.value.__notes__)
