"""Files of `save_dir`: which epoch they hold, and what becomes of an earlier fit's."""

from functools import partial

import lightning as L
import pytest
import torch
from helpers import lit as helpers
from helpers.lit import CONFIG, Lit, data, parameters, trainer

from lightning_da3 import (
    CheckpointError,
    ConfigError,
    DA3Callback,
    DA3Error,
    DA3Strategy,
    DomainError,
    convert,
)
from lightning_da3.files.domain_file import read_domain, write_domain

callback = partial(helpers.callback, predict=False)
NAN = float("nan")


class Scored(Lit):
    """Logs the next of `scores` at the end of every epoch, where `where` says."""

    def __init__(self, scores, where="training_step", dies=None):
        super().__init__()
        self.scores, self.where, self.dies = scores, where, dies

    def _log(self, where):
        if where == self.where:
            self.log("score", self.scores[self.current_epoch], on_step=False, on_epoch=True)

    def training_step(self, batch, batch_idx):
        self._log("training_step")
        if self.current_epoch == self.dies:
            raise DA3Error("enough")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self._log("validation_step")

    def on_validation_epoch_end(self):
        self._log("on_validation_epoch_end")

    def on_train_epoch_end(self):
        self._log("on_train_epoch_end")


WHERE = ("training_step", "validation_step", "on_validation_epoch_end", "on_train_epoch_end")


class Keeps(L.Callback):
    """The domain at the end of every epoch."""

    def __init__(self):
        self.epochs = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs.append(parameters(pl_module, "a"))


def fit(tmp_path, scores, where="training_step", dies=None, monitor="score", mode="max", **options):
    """Which epoch the file holds."""
    learner = callback(save_dir=str(tmp_path), monitor=monitor, mode=mode)
    keeps = Keeps()
    torch.manual_seed(len(scores))
    options = {"epochs": len(scores), "callbacks": [keeps], **options}
    try:
        trainer(tmp_path, learner, **options).fit(Scored(scores, where, dies), data(), data())
    finally:
        held = tensors(tmp_path)
        same = [all(torch.equal(held[k], v) for k, v in e.items()) for e in keeps.epochs]
    return same.index(True) if any(same) else None


def tensors(tmp_path, name="a.safetensors"):
    path = tmp_path / name
    return read_domain(path).tensors if path.exists() else {}


def names(tmp_path):
    return sorted(path.name for path in tmp_path.iterdir())


ONE = ["a.safetensors"]


@pytest.mark.parametrize("where", WHERE)
def test_the_best_epoch_is_saved_wherever_its_metric_is_logged(tmp_path, where):
    assert fit(tmp_path, [0.5, 0.9, 0.2], where) == 1
    assert read_domain(tmp_path / "a.safetensors").metadata["extra"]["metrics"]["score"] == (
        pytest.approx(0.9)
    )
    assert names(tmp_path) == ONE


@pytest.mark.parametrize(
    ("scores", "mode", "best"),
    [
        ([3.0, 1.0, 2.0], "min", 1),
        ([1.0, 1.0], "max", 1),
        ([NAN, 1.0, NAN], "max", 1),
        ([NAN], "max", 0),
    ],
)
def test_which_epoch_is_the_best(tmp_path, scores, mode, best):
    assert fit(tmp_path, scores, mode=mode) == best


def test_without_a_metric_the_last_epoch_is_saved(tmp_path):
    assert fit(tmp_path, [0.9, 0.5], monitor=None) == 1


def test_a_metric_of_another_epoch_is_not_taken_for_this_one(tmp_path):
    every_other = {"check_val_every_n_epoch": 2}
    assert fit(tmp_path, [9.0, 1.0, 9.0], "validation_step", **every_other) == 1


def test_a_better_file_of_an_earlier_fit_stays(tmp_path):
    fit(tmp_path, [0.9])
    before = (tmp_path / "a.safetensors").read_bytes()
    with pytest.warns(UserWarning, match="No epoch was as good as .* whose 'score' is 0.9"):
        assert fit(tmp_path, [0.1, 0.8]) is None
    assert (tmp_path / "a.safetensors").read_bytes() == before
    assert names(tmp_path) == ONE
    assert fit(tmp_path, [0.1, 0.9]) == 1  # as good is enough


def test_files_that_say_nothing_of_the_metric_are_replaced(tmp_path):
    fit(tmp_path, [0.9], monitor=None)
    path = tmp_path / "a.safetensors"
    file = read_domain(path)
    for metadata in ({**file.metadata, "backbone": "another"}, {}, {**file.metadata, "extra": 3}):
        write_domain(path, file.tensors, metadata)
        assert fit(tmp_path, [0.1]) == 0
    path.write_bytes(path.read_bytes()[:-1])
    assert fit(tmp_path, [0.1]) == 0


def test_the_earlier_file_is_kept_until_the_fit_ends(tmp_path):
    fit(tmp_path, [0.9], monitor=None)
    before = (tmp_path / "a.safetensors").read_bytes()
    previous = []

    class Looks(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            path = tmp_path / "a.safetensors.previous"
            previous.append(path.read_bytes() if path.exists() else None)

        on_train_end = on_train_epoch_end

    fit(tmp_path, [0.1, 0.2], monitor=None, callbacks=[Looks()])
    assert previous == [before] * 3
    assert names(tmp_path) == ONE
    assert (tmp_path / "a.safetensors").read_bytes() != before


def test_a_fit_that_fails_puts_the_earlier_file_back(tmp_path):
    fit(tmp_path, [0.9], monitor=None)
    before = (tmp_path / "a.safetensors").read_bytes()
    with pytest.raises(DA3Error, match="enough"):
        fit(tmp_path, [0.1, 0.2, 0.3], monitor=None, dies=2)
    assert (tmp_path / "a.safetensors").read_bytes() == before
    assert names(tmp_path) == ["a.safetensors", "a.safetensors.unfinished"]
    unfinished = tmp_path / "a.safetensors.unfinished"
    assert convert(Lit().net, CONFIG).load_domain(unfinished) == "a"


def test_a_fit_that_fails_without_an_earlier_file_leaves_its_own(tmp_path):
    with pytest.raises(DA3Error, match="enough"):
        fit(tmp_path, [0.1, 0.2], monitor=None, dies=1)
    assert names(tmp_path) == ONE


def test_nan_says_where_the_states_are(tmp_path):
    class Diverges(Lit):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (NAN if self.current_epoch else 1)

    fit(tmp_path, [0.9], monitor=None)
    with pytest.raises(DA3Error, match=r"a\.safetensors\.unfinished'; .* is again what it was"):
        trainer(tmp_path, callback(save_dir=str(tmp_path))).fit(Diverges(), data())
    assert names(tmp_path) == ["a.safetensors", "a.safetensors.unfinished"]


def test_what_a_killed_fit_left_is_put_back_by_the_next(tmp_path):
    fit(tmp_path, [0.9], monitor=None)
    path = tmp_path / "a.safetensors"
    earlier = path.read_bytes()
    fit(tmp_path, [0.2], monitor=None)
    killed = path.read_bytes()
    (tmp_path / "a.safetensors.previous").write_bytes(earlier)  # a killed fit removes nothing
    with pytest.raises(DA3Error, match="enough"):
        fit(tmp_path, [0.3], monitor=None, dies=0)
    assert path.read_bytes() == earlier
    assert (tmp_path / "a.safetensors.unfinished").read_bytes() == killed


def test_a_resumed_fit_goes_on_with_the_earlier_file_of_the_first(tmp_path):
    fit(tmp_path, [0.9], monitor=None)
    earlier = (tmp_path / "a.safetensors").read_bytes()
    first = trainer(tmp_path, callback(save_dir=str(tmp_path)), epochs=1)
    first.fit(Lit(), data())
    first.save_checkpoint(tmp_path / "a.ckpt")
    (tmp_path / "a.safetensors.previous").write_bytes(earlier)  # as if it had been killed

    class Looks(L.Callback):
        def on_train_end(self, trainer, pl_module):
            assert (tmp_path / "a.safetensors.previous").read_bytes() == earlier

    again = trainer(tmp_path, callback(save_dir=str(tmp_path)), callbacks=[Looks()])
    again.fit(Lit(), data(), ckpt_path=tmp_path / "a.ckpt")
    assert names(tmp_path) == ["a.ckpt", "a.safetensors"]


@pytest.mark.parametrize("count", [True, 2])
def test_fast_dev_run_writes_nothing(tmp_path, count):
    folder = tmp_path / "new"
    for monitor in (None, "score"):
        learner = callback(save_dir=str(folder), monitor=monitor)
        trainer(tmp_path, learner, fast_dev_run=count).fit(Scored([0.1]), data(), data())
    assert not folder.exists()
    fit(tmp_path, [0.9])
    before = (tmp_path / "a.safetensors").read_bytes()
    trainer(tmp_path, callback(save_dir=str(tmp_path)), fast_dev_run=count).fit(Lit(), data())
    assert names(tmp_path) == ONE
    assert (tmp_path / "a.safetensors").read_bytes() == before


@pytest.mark.parametrize("scores", [[1.0], [1.0, 2.0]])
def test_a_metric_that_is_not_logged_is_found_out_after_an_epoch(tmp_path, scores):
    module = Scored(scores, dies=1)
    learner = callback(save_dir=str(tmp_path), monitor="scor")
    with pytest.raises(ConfigError, match=r"monitors what is not logged.*Logged are .*'score'"):
        trainer(tmp_path, learner, epochs=len(scores)).fit(module, data(), data())
    assert names(tmp_path) == []


def test_wrong_arguments(tmp_path):
    with pytest.raises(ConfigError, match=r"`mode` must be one of \('min', 'max'\), got 'best'"):
        callback(save_dir=str(tmp_path), mode="best")
    with pytest.raises(ConfigError, match="give a `save_dir`"):
        callback(monitor="score")
    with pytest.raises(DomainError, match="differ by case alone"):
        DA3Callback({"a": 2, "A": 2}, save_dir=str(tmp_path))
    DA3Callback({"a": 2, "A": 2})
    with pytest.raises(ConfigError, match=r"\['monitor'\] say how to learn a domain"):
        DA3Strategy(monitor="score")


def test_what_is_in_the_way_is_found_before_training(tmp_path):
    (tmp_path / "A.safetensors").write_text("")
    with pytest.raises(DomainError, match="'a' and 'A' differ by case alone"):
        fit(tmp_path, [0.1], monitor=None, dies=0)
    (tmp_path / "b" / "a.safetensors").mkdir(parents=True)
    learner = callback(save_dir=str(tmp_path / "b"))
    with pytest.raises(CheckpointError, match=r"Cannot read the domain file .*it is a folder"):
        trainer(tmp_path, learner).fit(Scored([0.1], dies=0), data(), data())


def test_the_strategy_saves_by_a_metric_as_well(tmp_path):
    strategy = DA3Strategy("a", 2, CONFIG, save_dir=str(tmp_path), monitor="score", mode="max")
    runner = trainer(tmp_path, Keeps(), epochs=3, strategy=strategy, devices=1)
    runner.fit(Scored([0.5, 0.9, 0.2]), data(), data())
    assert read_domain(tmp_path / "a.safetensors").metadata["extra"]["metrics"]["score"] == (
        pytest.approx(0.9)
    )
