"""What the loggers of a run are given, with real loggers and a DA3Callback alone."""

import sys
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from helpers.lit import CONFIG, Lit, callback, data, parameters, trainer
from helpers.tracked import fit, logger_of
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_da3 import DA3Callback, DA3Config, DomainLoader
from lightning_da3.files.domain_file import read_domain
from lightning_da3.trainer import tracking
from lightning_da3.trainer.samples import Samples


def files(folder):
    return {path.name for path in folder.iterdir()} - {"metrics.csv", "hparams.yaml"}


PICTURES = {
    *("da3-memory.png", "da3-memory_of_a_step.png", "da3-memory_by_layer.csv"),
    *("da3-gates-a.png", "da3-executed_shares-a.png"),
}


# --- other loggers --------------------------------------------------------------------------------


def test_beside_a_csv_logger_pictures_are_files(tmp_path):
    pytest.importorskip("matplotlib")
    fit(tmp_path, logger_of(tmp_path))
    assert files(tmp_path / "logs") == PICTURES
    assert "da3/step" not in (tmp_path / "logs" / "metrics.csv").read_text()


def test_pictures_of_every_few_epochs(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(tracking, "EVERY", 2)
    monkeypatch.setattr(tracking.Tracking, "_log_memory", lambda *_: None)
    monkeypatch.setattr(
        tracking.Tracking, "_draw_gates", lambda self, domain, seen, step: drawn.append(step)
    )
    fit(tmp_path, logger_of(tmp_path), epochs=3)
    assert drawn == [6, 9]
    drawn.clear()
    fit(tmp_path, CSVLogger(tmp_path), epochs=2)
    assert drawn == [6]  # the last is not drawn twice


def test_tensorboard_gets_images(tmp_path):
    pytest.importorskip("matplotlib")
    if find_spec("tensorboard") is None and find_spec("tensorboardX") is None:
        pytest.skip("no TensorBoard")
    from lightning.pytorch.loggers import TensorBoardLogger

    both = DA3Callback({"a": 2, "b": 2}, config=CONFIG)
    loaders = {"a": data(), "b": data(1)}
    logger = TensorBoardLogger(tmp_path, name="", version="")
    fit(tmp_path, logger, None, both, loaders, train=DomainLoader(loaders))
    (path,) = tmp_path.glob("events*")
    written = path.read_bytes()
    for name in ("da3/memory", "da3/gates/a", "da3/gates/b", "da3/executed_shares/b", "loss/a"):
        assert name.encode() in written, name
    assert b"da3/step/a" not in written
    assert b"\x89PNG" in written


def test_without_matplotlib_there_are_no_pictures(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    fit(tmp_path, logger_of(tmp_path))
    assert files(tmp_path / "logs") == {"da3-memory_by_layer.csv"}


def test_other_loggers_and_trials_get_no_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class Other(CSVLogger.__mro__[1]):
        name = version = "none"

        def log_hyperparams(self, *args, **kwargs):
            """Nothing."""

        log_metrics = log_hyperparams

    fit(tmp_path, Other())
    fit(tmp_path, logger_of(tmp_path), fast_dev_run=True)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".png", ".csv")]


def test_a_logger_that_fails_ends_no_fit(tmp_path):
    class Full(CSVLogger):
        def log_hyperparams(self, params=None):
            (tmp_path / "logs" / "da3-memory_by_layer.csv").mkdir()
            raise OSError("no space left")

    Full.__name__ = "CSVLogger"
    with (
        pytest.warns(UserWarning, match="Could not log settings .*no space left"),
        pytest.warns(UserWarning, match="Could not log memory by layer"),
    ):
        _, fitter = fit(tmp_path, Full(tmp_path, name="logs", version=""))
    assert fitter.global_step == 6


@pytest.mark.slow
def test_pictures_change_nothing_that_is_learned(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "EVERY", 1)

    def learned(loggers):
        torch.manual_seed(0)
        module, _ = fit(tmp_path, loggers)
        return parameters(module, "a"), module

    plain, _ = learned(False)
    drawn, module = learned(logger_of(tmp_path))
    for name, value in plain.items():
        assert torch.equal(value, drawn[name]), name
    assert module.net.training
    assert not module.net._forward_pre_hooks


@pytest.mark.slow
def test_the_bytes_of_a_step_are_those_without_pictures(tmp_path):
    def figures(loggers):
        da3 = callback()
        fit(tmp_path, loggers, da3=da3)
        return da3.first_steps.saved_activation_bytes, da3.first_steps.peak_bytes

    assert figures(False) == figures(logger_of(tmp_path))


@pytest.mark.slow
def test_an_epoch_that_was_no_better_is_not_the_best(tmp_path, monkeypatch):
    class Tracker(CSVLogger):
        """Nothing is uploaded."""

    logged = []

    def note(logger, path, domain, *, best):
        logged.append((best, read_domain(path).metadata["extra"]["metrics"]["score"], path.parent))

    monkeypatch.setattr(tracking, "log_domain", note)
    monkeypatch.setattr(tracking.Curves, "lend", lambda *_: None)

    class Scored(Lit):
        scores = (0.5, 0.4)

        def on_train_epoch_end(self):
            self.log("score", self.scores[self.current_epoch])

    def learn(module):
        saves = {"save_dir": str(tmp_path), "monitor": "score", "mode": "max"}
        logger = Tracker(tmp_path, name="logs", version=str(len(logged)))
        fitter = trainer(tmp_path, callback(**saves), logger=logger, log_every_n_steps=1)
        monkeypatch.setattr(tracking, "is_wandb", lambda other: other is logger)
        monkeypatch.setattr(tracking, "log_summary", lambda *_: None)
        fitter.fit(module, data())

    learn(Scored())
    worse = Scored()
    worse.scores = (0.1, 0.2)
    with pytest.warns(UserWarning, match="No epoch was as good"):
        learn(worse)
    (first, score, folder), (second, last, elsewhere) = logged
    assert (first, score, folder) == (True, 0.5, tmp_path)  # the best epoch
    assert (second, last) == (False, pytest.approx(0.2))
    assert elsewhere != tmp_path


# --- images ---------------------------------------------------------------------------------------


def test_steps_are_counted_by_domain_and_resumed(tmp_path):
    da3 = callback()
    fit(tmp_path, False, da3=da3)
    assert da3.state_dict()["steps"] == {"a": 6}
    other = callback()
    other.load_state_dict(da3.state_dict())
    assert other.tracking.curves.steps == {"a": 6}
    other.load_state_dict({"domains": ["a"]})  # of an earlier version
    assert other.tracking.curves.steps == {}


def test_captions_say_the_class_and_what_it_was_taken_for(tmp_path):
    module, _ = fit(tmp_path, False)
    module.net.domain("a").class_names = ["dark", "bright"]
    x, y = next(iter(data()))
    samples = Samples()
    module.net.train()
    samples.step_begins(module.net)
    module.net(x)
    samples.step_ends(module.net, (x, y))
    seen = samples.look(module.net, "a")
    predicted = module.net.eval()(x).argmax(1)
    names = ["dark", "bright"]
    for i, caption in enumerate(seen.captions):
        right = predicted[i] == y[i]
        taken = "right" if right else f"taken for {names[predicted[i]]}"
        assert caption == f"{names[y[i]]}, {taken}"
    assert torch.equal(seen.images, x[:4])


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

    def forward(self, x, y):
        return self.fc(self.conv(x + y).relu().mean((2, 3)))


@pytest.mark.slow
def test_networks_of_several_inputs_have_no_pictures_of_gates(tmp_path):
    class Module(Lit):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0], batch[0]), batch[1])

    module = Module("elsewhere")
    module.net = TwoInputs()
    fitter = trainer(tmp_path, callback(), logger=logger_of(tmp_path), log_every_n_steps=1)
    fitter.fit(module, data())
    assert not [name for name in files(tmp_path / "logs") if "gates" in name]


def test_ungated_networks_have_no_pictures_of_gates(tmp_path):
    da3 = DA3Callback("a", 2, DA3Config(adapter=CONFIG.adapter, gate=None))
    fit(tmp_path, logger_of(tmp_path), da3=da3)
    assert not [name for name in files(tmp_path / "logs") if "gates" in name or "shares" in name]


def test_a_run_without_loggers_keeps_and_draws_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "has_matplotlib", lambda: pytest.fail("nobody asked"))
    monkeypatch.setattr(Samples, "step_begins", lambda *_: pytest.fail("nobody looks"))
    fit(tmp_path, False)
