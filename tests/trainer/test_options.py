"""Precisions, callbacks that watch, the tuner and torch.compile."""

import warnings

import lightning as L
import pytest
import torch
from helpers.doors import DOORS, EITHER, Watched, through
from helpers.lit import CONFIG, KINDS, Lit, data, lit
from helpers.lit import parameters as domain_parameters
from helpers.marks import others_by_hand
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner

from lightning_da3 import DA3Config, GateConfig, MemoryConfig


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("door", EITHER)
@pytest.mark.parametrize("made", KINDS)
@pytest.mark.slow
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
@pytest.mark.slow
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


@pytest.mark.parametrize("door", others_by_hand(EITHER, EITHER[0]))
@pytest.mark.parametrize("backend", others_by_hand(["eager", "aot_eager"], "eager"))
@pytest.mark.parametrize(
    "gate", others_by_hand([None, GateConfig(target=0.5, noise=False, by="cell")], None)
)
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
