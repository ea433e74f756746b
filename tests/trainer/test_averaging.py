"""Weight averaging: the domain is averaged, frozen weights stay."""

import lightning as L
import pytest
import torch
from helpers.doors import EITHER, QUIET, Watched, through
from helpers.lit import KINDS, callback, data, lit, network
from helpers.lit import parameters as domain_parameters
from helpers.lit import trainer as make_trainer
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)

from lightning_da3 import convert


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


@pytest.mark.parametrize("first", [True, False])
def test_averages_in_checkpoints_have_no_backbone_whichever_callback_comes_first(tmp_path, first):
    saver, ema = ModelCheckpoint(dirpath=tmp_path), EMAWeightAveraging(decay=0.7)
    callbacks = [callback(), ema] if first else [ema, callback()]
    fitter = make_trainer(
        tmp_path, callbacks[0], 1, callbacks=[callbacks[1], saver], enable_checkpointing=True
    )
    fitter.fit(lit(), data())
    saved = torch.load(saver.best_model_path, weights_only=True)
    for state in (saved["state_dict"], saved["current_model_state"]):
        assert any(key.startswith("net.bank.a.") for key in state)
        assert not [key for key in state if key.startswith("net.backbone.")]
