"""DA3Strategy, DA3DDPStrategy and DA3Callback: the same run through every door."""

import lightning as L
import pytest
import torch
from helpers.doors import DOORS, EITHER, QUIET, Watched, through
from helpers.lit import CONFIG, KINDS, Lit, callback, data, lit, logits
from helpers.lit import parameters as domain_parameters
from helpers.lit import trainer as make_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_da3 import (
    ConfigError,
    DA3Callback,
    DA3Config,
    DA3DDPStrategy,
    DA3Model,
    DA3Strategy,
    DomainLoader,
    MemoryConfig,
)


@pytest.mark.parametrize("made", KINDS)
@pytest.mark.slow
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
@pytest.mark.slow
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


LENT = {"load_checkpoint", "load_model_state_dict", "lightning_module_state_dict"}


@pytest.mark.parametrize(
    ("strategy", "domains", "split", "lent"),
    [
        ("auto", {"a": 2}, "pieces", LENT),
        ("auto", {"a": 2, "b": 2}, "pieces", LENT | {"training_step"}),
        ("auto", {"a": 2}, "accumulate", LENT | {"training_step"}),
        ("da3", {"a": 2, "b": 2}, "accumulate", set()),
    ],
)
def test_a_strategy_is_lent_only_what_hooks_cannot_do(tmp_path, strategy, domains, split, lent):
    config = DA3Config(CONFIG.adapter, CONFIG.gate, MemoryConfig(split=split))
    fitter = make_trainer(tmp_path, DA3Callback(domains, config=config), 1, strategy=strategy)
    fitter.fit(lit(), DomainLoader({n: data() for n in domains}) if len(domains) > 1 else data())
    own = fitter.strategy
    assert {name for name in vars(own) if callable(getattr(type(own), name, None))} == lent


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
@pytest.mark.slow
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
