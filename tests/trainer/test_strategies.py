"""DA3Strategy, DA3DDPStrategy and DA3Callback: the same run through every door."""

import copy
import warnings
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from helpers.lit import (
    CONFIG,
    KINDS,
    Lit,
    LitConfigure,
    LitSetup,
    callback,
    data,
    lit,
    logits,
    network,
)
from helpers.lit import parameters as domain_parameters
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.tuner import Tuner
from torch import nn

from lightning_da3 import (
    CheckpointError,
    ConfigError,
    DA3Callback,
    DA3Config,
    DA3DDPStrategy,
    DA3Error,
    DA3Model,
    DA3Strategy,
    GateConfig,
    MemoryConfig,
    convert,
    load_from_checkpoint,
)
from lightning_da3.trainer.averaging import AVERAGING_CALLBACKS
from lightning_da3.trainer.optimizers import drop_frozen_
from lightning_da3.trainer.refusals import (
    REFUSED_CALLBACKS,
    REFUSED_PRECISIONS,
    check_plugins,
    check_strategy,
)

DOORS = ("callback", "strategy and callback", "strategy")
EITHER = ("callback", "strategy")  # where the doors meet other choices
QUIET = DA3Config(adapter=CONFIG.adapter, gate=None)  # nothing random but the fresh adapters


def through(door, tmp_path, domain="a", num_classes=2, config=CONFIG, epochs=2, **kwargs):
    """A Trainer that learns `domain`, told through one of the doors."""
    callbacks = kwargs.pop("callbacks", [])
    if door != "strategy":
        callbacks = [*callbacks, DA3Callback(domain, num_classes, config)]
    strategy = {
        "callback": "auto",
        "strategy and callback": "da3",
        "strategy": DA3Strategy(domain, num_classes, config),
    }[door]
    kwargs = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu", **kwargs}
    return L.Trainer(
        strategy=strategy,
        max_epochs=epochs,
        default_root_dir=tmp_path,
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )


def checkpoint(tmp_path, made="init", domain="a", config=CONFIG, **kwargs):
    """The path of a checkpoint of a fitted module, and the module."""
    saver = ModelCheckpoint(dirpath=tmp_path / "saved", **kwargs)
    module = lit(made)
    trainer = through(
        "strategy", tmp_path, domain, config=config, enable_checkpointing=True, callbacks=[saver]
    )
    trainer.fit(module, data())
    return saver.best_model_path, module


class Watched(Lit):
    """Validates, too, so that callbacks have something to watch."""

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y))

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return self.net(batch[0])


# --- the doors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", KINDS)
def test_every_door_trains_the_same(tmp_path, made):
    learned = []
    for door in DOORS:
        module = lit(made)
        torch.manual_seed(1)
        through(door, tmp_path, config=QUIET).fit(module, data())
        learned.append(domain_parameters(module, "a"))
    for other in learned[1:]:
        torch.testing.assert_close(other, learned[0], rtol=0, atol=0)


@pytest.mark.parametrize("made", KINDS)
@pytest.mark.parametrize("door", EITHER)
def test_fit_validate_test_predict_and_every_ckpt_path(tmp_path, door, made):
    class Module(Watched, KINDS[made]):
        pass

    module = Module(made)
    saver = ModelCheckpoint(dirpath=tmp_path, monitor="loss", save_last=True)
    trainer = through(door, tmp_path, enable_checkpointing=True, callbacks=[saver])
    trainer.fit(module, data(), data(1))
    learned = logits(module, "a")
    for ckpt_path in ("last", "best", saver.best_model_path):
        trainer.test(dataloaders=data(), ckpt_path=ckpt_path, verbose=False)
        trainer.validate(dataloaders=data(), ckpt_path=ckpt_path, verbose=False)
        trainer.predict(dataloaders=data(), ckpt_path=ckpt_path)
    fresh = Module(made)
    fresh_trainer = through(door, tmp_path)
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint"):
        predicted = fresh_trainer.predict(fresh, data(), ckpt_path=str(tmp_path / "last.ckpt"))
    assert torch.equal(logits(fresh, "a"), learned)
    assert predicted[0].shape == (4, 2)
    longer = through(door, tmp_path, epochs=3)
    longer.fit(Module(made), data(), data(1), ckpt_path=str(tmp_path / "last.ckpt"))
    assert longer.global_step == 9


def test_names_are_registered_and_devices_checked(tmp_path):
    trainer = L.Trainer(strategy="da3", accelerator="cpu", logger=False)
    assert isinstance(trainer.strategy, DA3Strategy)
    assert trainer.strategy.root_device == torch.device("cpu")
    trainer = L.Trainer(strategy="da3_ddp", accelerator="cpu", devices=2, logger=False)
    assert isinstance(trainer.strategy, DA3DDPStrategy)
    assert trainer.num_devices == 2
    with pytest.raises(ConfigError, match=r'was given 2.*strategy="da3_ddp"'):
        L.Trainer(strategy="da3", accelerator="cpu", devices=2, logger=False)


def test_a_device_is_taken_over():
    strategy = DA3Strategy()
    assert strategy.parallel_devices is None
    strategy.parallel_devices = [torch.device("cuda", 1)]
    assert strategy.root_device == torch.device("cuda", 1)


def test_what_to_learn_must_be_said_once(tmp_path):
    quiet = {"accelerator": "cpu", "logger": False, "max_epochs": 1}
    with pytest.raises(ConfigError, match="shall learn was not said"):
        L.Trainer(strategy="da3", **quiet).fit(lit(), data())
    both = L.Trainer(strategy=DA3Strategy("a", 2), callbacks=[callback()], **quiet)
    with pytest.raises(ConfigError, match="shall learn is said twice"):
        both.fit(lit(), data())
    with pytest.raises(ConfigError, match=r"\['backbone', 'num_classes'\].*`domain` is missing"):
        DA3Strategy(num_classes=2, backbone="net")
    two = through("callback", tmp_path, callbacks=[callback("b", 3)])
    with pytest.raises(ConfigError, match=r"DA3Callback\(\{'b': 10, 'a': 10\}\)"):
        two.fit(lit(), data())


def test_the_strategy_converts_before_any_callback_sees_the_module(tmp_path):
    seen = []

    class First(L.Callback):
        def setup(self, trainer, pl_module, stage):
            seen.append(type(pl_module.net))

    through("strategy", tmp_path, callbacks=[First()]).fit(lit(), data())
    assert seen == [DA3Model]


@pytest.mark.parametrize("strategy", ["auto", "da3"])
def test_a_module_may_bring_the_callback_anew_for_every_fit(tmp_path, strategy):
    class Brings(Lit):
        domain = "a"

        def configure_callbacks(self):
            return [DA3Callback(self.domain, 2, CONFIG)]

    module = Brings()
    trainer = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data())
    first = domain_parameters(module, "a")
    module.domain = "b"
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, data())
    assert trainer.global_step == 6
    assert module.net.domains == ["a", "b"]
    torch.testing.assert_close(domain_parameters(module, "a"), first, rtol=0, atol=0)
    assert any(v.any() for k, v in domain_parameters(module, "b").items() if "value.weight" in k)


def test_a_module_that_edits_its_network_in_setup_is_converted_after_it(tmp_path):
    class Edits(Lit):
        def setup(self, stage):
            self.net[8] = nn.Linear(8, 3)

    module = Edits()
    through("strategy", tmp_path).fit(module, data())
    module.net.set_domain(None)
    assert module.net(torch.ones(1, 3, 16, 16)).shape == (1, 3)


# --- optimizers -----------------------------------------------------------------------------------


def test_frozen_parameters_leave_groups_and_state_and_empty_groups_stay():
    frozen, trained = (nn.Parameter(torch.ones(2)) for _ in range(2))
    named = [{"params": [("f", frozen)]}, {"params": [("g", frozen.clone()), ("t", trained)]}]
    optimizer = torch.optim.Adam([{"params": [("f", frozen)]}, {"params": [("t", trained)]}])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    (frozen.sum() + trained.sum()).backward()
    optimizer.step()
    frozen.requires_grad_(False)
    drop_frozen_([optimizer])
    assert [group["params"] for group in optimizer.param_groups] == [[], [trained]]
    assert [group["param_names"] for group in optimizer.param_groups] == [[], ["t"]]
    assert list(optimizer.state) == [trained]
    optimizer.step()
    scheduler.step()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert len(named) == len(optimizer.param_groups)


class TwoGroups(Lit):
    """As one writes it for fine-tuning: a slow backbone, a fast rest, a scheduler."""

    def configure_optimizers(self):
        groups = [
            {"params": self.net.backbone.parameters(), "lr": 1e-4},
            {"params": self.net.bank.parameters()},
        ]
        optimizer = torch.optim.SGD(groups, 1e-2, momentum=0.9, weight_decay=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


@pytest.mark.parametrize("door", DOORS)
def test_optimizers_hold_what_trains_and_nothing_else(tmp_path, door):
    module = TwoGroups()
    trainer = through(door, tmp_path)
    trainer.fit(module, data())
    trained = {id(p) for p in module.net.domain("a").parameters()}
    groups = [{id(p) for p in g["params"]} for g in trainer.optimizers[0].param_groups]
    assert groups == [set(), trained]
    assert {id(p) for p in trainer.optimizers[0].state} <= trained


def test_an_optimizer_of_nothing_that_trains_is_refused(tmp_path):
    class Wrong(Lit):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net.backbone.parameters(), 0.1)

    with pytest.raises(ConfigError, match=r"No optimizer holds a parameter of \['a'\]"):
        through("callback", tmp_path).fit(Wrong(), data())


# --- checkpoints ----------------------------------------------------------------------------------


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
        (lambda s: s.update({"net.bank.a.more": torch.ones(1)}), r"has \['net.bank.a.more'\]"),
        (lambda s: s.update({"net.bank.a.head.bias": torch.ones(9)}), "size mismatch"),
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


class WithHyperParameters(Lit):
    def __init__(self, lr, made="init"):
        super().__init__(made, lr)
        self.save_hyperparameters()


class ConfigureWithHyperParameters(WithHyperParameters, LitConfigure):
    def __init__(self, lr):
        super().__init__(lr, "configure_model")


@pytest.mark.parametrize("kind", [WithHyperParameters, ConfigureWithHyperParameters])
def test_load_from_checkpoint_keeps_every_domain(tmp_path, kind):
    module = kind(3e-3)
    through("callback", tmp_path, "a").fit(module, data())
    trainer = through("callback", tmp_path, "b", 3)
    trainer.fit(module, data(1))
    trainer.save_checkpoint(tmp_path / "both.ckpt")
    loader = kind.load_state_dict
    again = load_from_checkpoint(kind, tmp_path / "both.ckpt")
    assert kind.load_state_dict is loader
    assert type(again) is kind
    assert again.lr == 3e-3
    assert again.net.domains == ["a", "b"]
    assert again.net.active_domain == "b"
    for domain in "ab":
        assert torch.equal(logits(again, domain), logits(module, domain))
    other = load_from_checkpoint(kind, tmp_path / "both.ckpt", lr=1.0, strict=False)
    assert other.lr == 1.0
    assert torch.equal(logits(other, "a"), logits(module, "a"))


def test_load_from_checkpoint_refuses_what_it_cannot_load(tmp_path):
    path, _ = checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="network 'net', which LitSetup does not have"):
        load_from_checkpoint(LitSetup, path, made="setup")
    plain = {"state_dict": Lit().state_dict(), "pytorch-lightning_version": "2.5.0"}
    torch.save(plain, tmp_path / "plain.ckpt")
    with pytest.raises(CheckpointError, match=r"no domain. Use Lit.load_from_checkpoint"):
        load_from_checkpoint(Lit, tmp_path / "plain.ckpt")
    with pytest.raises(RuntimeError, match="Unexpected key"):
        Lit.load_from_checkpoint(path)  # the trap that ours avoids


# --- other parts of a Trainer ---------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("door", EITHER)
@pytest.mark.parametrize("made", KINDS)
def test_precisions(tmp_path, door, precision, made):
    module = lit(made)
    saver = ModelCheckpoint(dirpath=tmp_path)
    through(door, tmp_path, precision=precision, enable_checkpointing=True, callbacks=[saver]).fit(
        module, data()
    )
    kind = torch.bfloat16 if precision == "bf16-true" else torch.float32
    values = domain_parameters(module, "a")
    assert {value.dtype for value in values.values()} == {kind}
    assert any(value.any() for name, value in values.items() if "value.weight" in name)
    again = lit(made)
    through(door, tmp_path, precision=precision).test(
        again, data(), ckpt_path=saver.best_model_path, verbose=False
    )
    torch.testing.assert_close(domain_parameters(again, "a"), values, rtol=0, atol=0)


@pytest.mark.parametrize("door", DOORS)
def test_callbacks_that_watch_work(tmp_path, door):
    monitor = LearningRateMonitor()
    stopper = EarlyStopping("val_loss", patience=0, min_delta=10.0)
    saver = ModelCheckpoint(dirpath=tmp_path / "saved", monitor="val_loss", save_last=True)
    trainer = through(
        door,
        tmp_path,
        epochs=9,
        callbacks=[monitor, stopper, saver],
        logger=CSVLogger(tmp_path),
        enable_checkpointing=True,
        gradient_clip_val=0.1,
        accumulate_grad_batches=2,
        log_every_n_steps=1,
    )
    trainer.fit(Watched(), data(), data(1))
    assert trainer.current_epoch == 2  # stopped early
    assert trainer.global_step == 4  # of 6 batches
    assert monitor.lrs["lr-AdamW"]
    assert saver.best_model_path


def test_gate_loss_follows_the_schedule_of_accumulation(tmp_path):
    scales = []

    class Notes(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            scales.append(pl_module.net.gate_loss_scale)

    schedule = L.pytorch.callbacks.GradientAccumulationScheduler({0: 1, 1: 2})
    through("callback", tmp_path, callbacks=[Notes(), schedule]).fit(lit(), data())
    assert scales == [1.0] * 3 + [0.5] * 3


def test_gate_loss_is_scaled_as_float16_training_scales_the_loss(tmp_path):
    """Or its gradients would be divided by a factor that they were never multiplied by."""
    scales = []

    class Notes(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            scales.append(pl_module.net.gate_loss_scale)

    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
    plugin = L.pytorch.plugins.MixedPrecision("16-mixed", "cpu", scaler)
    through("callback", tmp_path, callbacks=[Notes()], plugins=[plugin]).fit(lit(), data())
    assert scales == [64.0, 64.0, 128.0, 128.0, 256.0, 256.0]


def averaging(kind):
    if kind == "ema":
        return EMAWeightAveraging(decay=0.7)
    return StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=2)


@pytest.mark.parametrize("kind", ["ema", "swa"])
@pytest.mark.parametrize("made", KINDS)
@pytest.mark.parametrize("door", EITHER)
@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that")
def test_weight_averaging_averages_the_domain_and_nothing_else(tmp_path, door, made, kind):
    class Module(Watched, KINDS[made]):
        pass

    module = Module(made)
    before = [v.clone() for v in convert(network(), QUIET).backbone.state_dict().values()]
    saver = ModelCheckpoint(dirpath=tmp_path)
    history = []

    class Keeps(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            history.append(domain_parameters(pl_module, "a"))

    trainer = through(
        door,
        tmp_path,
        config=QUIET,
        epochs=3,
        callbacks=[averaging(kind), Keeps(), saver],
        enable_checkpointing=True,
    )
    trainer.fit(module, data(), data(1))
    after = list(module.net.backbone.state_dict().values())
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    if kind == "ema":
        # the callback sees the parameters after the first step and every later one
        mean = history[0]
        for step in history[1:]:
            mean = {k: 0.7 * v + 0.3 * step[k] for k, v in mean.items()}
    else:  # at the starts of the second epoch and the third
        mean = {k: (v + history[5][k]) / 2 for k, v in history[2].items()}
    torch.testing.assert_close(domain_parameters(module, "a"), mean)
    saved = torch.load(saver.best_model_path, weights_only=True)
    states = [saved["state_dict"], saved.get("current_model_state", {})]
    assert [key for state in states for key in state if key.startswith("net.backbone.")] == []


def test_ema_resumes(tmp_path):
    saver = ModelCheckpoint(dirpath=tmp_path)
    whole = lit()
    torch.manual_seed(1)
    ema = EMAWeightAveraging(decay=0.7)
    through("callback", tmp_path, config=QUIET, callbacks=[ema]).fit(whole, data())
    begun = lit()
    torch.manual_seed(1)
    first = [EMAWeightAveraging(decay=0.7), saver]
    through(
        "callback", tmp_path, config=QUIET, epochs=1, callbacks=first, enable_checkpointing=True
    ).fit(begun, data())
    resumed = lit()
    trainer = through("callback", tmp_path, config=QUIET, callbacks=[EMAWeightAveraging(decay=0.7)])
    trainer.fit(resumed, data(), ckpt_path=saver.best_model_path)
    expected = domain_parameters(whole, "a")
    torch.testing.assert_close(domain_parameters(resumed, "a"), expected, rtol=0, atol=0)


@pytest.mark.parametrize("door", EITHER)
def test_the_tuner_finds_a_learning_rate_and_leaves_the_domain_as_it_was(tmp_path, door):
    module = lit()
    trainer = through(door, tmp_path, epochs=10)
    found = Tuner(trainer).lr_find(module, data(), num_training=20, early_stop_threshold=None)
    assert found is not None
    assert len(found.results["lr"]) == 20
    values = domain_parameters(module, "a")
    assert not any(value.any() for name, value in values.items() if "value.weight" in name)
    trainer.fit(module, data())
    assert trainer.global_step == 30
    assert not list(tmp_path.glob(".lr_find*"))


@pytest.mark.parametrize("door", EITHER)
def test_the_tuner_scales_the_batch_size(tmp_path, door):
    class Sized(Lit):
        batch_size = 1

        def train_dataloader(self):
            return torch.utils.data.DataLoader(data().dataset, batch_size=self.batch_size)

    module = Sized()
    trainer = through(door, tmp_path)
    size = Tuner(trainer).scale_batch_size(module, steps_per_trial=1, max_trials=2, init_val=1)
    assert size == module.batch_size > 1
    trainer.fit(module)
    assert trainer.global_step == 2 * -(-12 // size)


class Freezes(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.net)

    def finetune_function(self, pl_module, epoch, optimizer):
        raise AssertionError("refused before")


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (Freezes, "Freezes cannot be used with a domain. It unfreezes the backbone"),
        (BackboneFinetuning, "BackboneFinetuning cannot .* It unfreezes the backbone"),
        (lambda: ModelPruning("l1_unstructured"), "ModelPruning .* It prunes the backbone"),
    ],
)
def test_callbacks_that_would_touch_the_backbone_are_refused(tmp_path, made, reason):
    for door in DOORS[1:]:
        with pytest.raises(ConfigError, match=reason):
            through(door, tmp_path, callbacks=[made()]).fit(lit(), data())
    trainer = through("callback", tmp_path)
    trainer.callbacks.append(made())
    with pytest.raises(ConfigError, match=reason):
        trainer.fit(lit(), data())


@pytest.mark.parametrize("name", REFUSED_PRECISIONS)
def test_precisions_that_would_replace_layers_are_refused(name):
    assert hasattr(L.pytorch.plugins, name)  # each needs a package of its own to be made
    plugin = type(name, (), {"__module__": "lightning.pytorch.plugins.precision"})()
    trainer = SimpleNamespace(callbacks=[], precision_plugin=plugin)
    with pytest.raises(ConfigError, match=f"{name} cannot be used with a domain. It replaces"):
        check_plugins(trainer)


def test_parts_known_by_name_exist():
    for name in (*REFUSED_CALLBACKS, *AVERAGING_CALLBACKS):
        assert hasattr(L.pytorch.callbacks, name)


def test_whatever_edits_a_frozen_tensor_is_found_out(tmp_path):
    class Edits(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            next(pl_module.net.backbone.parameters()).data.mul_(1.0001)

    with pytest.raises(DA3Error, match=r"1 frozen tensors changed while \['a'\] trained, such as"):
        through("callback", tmp_path, callbacks=[Edits()]).fit(lit(), data())


def test_other_strategies_are_refused_by_name():
    class Mine(DDPStrategy):
        """Derived from one that works."""

    class DeepSpeedStrategy(DDPStrategy):
        __module__ = "lightning.pytorch.strategies.deepspeed"

    check_strategy(Mine())
    for strategy in (FSDPStrategy(), ModelParallelStrategy(), DeepSpeedStrategy(), object()):
        with pytest.raises(ConfigError, match=rf'{type(strategy).__name__} is not.*"da3_ddp"'):
            check_strategy(strategy)


def test_a_fit_that_would_train_nothing_is_refused(tmp_path):
    module = lit()
    trainer = through("callback", tmp_path)
    trainer.fit(module, data())
    with pytest.raises(DA3Error, match=r"train \['a'\] for 0 steps.*max_epochs=2"):
        trainer.fit(module, data())
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, data())
    assert trainer.global_step == 9


# --- torch.compile --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("door", EITHER)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("gate", [None, GateConfig(noise=False)], ids=["plain", "gated"])
def test_a_compiled_module_trains_the_same(tmp_path, door, backend, gate):
    memory = MemoryConfig(exact=True)  # codes' last digits differ, and Adam makes much of them
    config = DA3Config(adapter=CONFIG.adapter, gate=gate, memory=memory)
    learned = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(1)
        module = lit()
        fitted = torch.compile(module, backend=backend) if compiled else module
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of dynamo's own
            through(door, tmp_path, config=config).fit(fitted, data())
        learned.append(domain_parameters(module, "a"))
    torch.testing.assert_close(learned[1], learned[0])
