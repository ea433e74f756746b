"""Names of metrics: of which domain they are, what is better, and which are accuracies."""

import copy

import pytest
from helpers.lit import callback, data, trainer
from helpers.tracked import fit, logger_of

from lightning_da3.trainer.accuracies import Accuracies, accuracies_in
from lightning_da3.trainer.curves import better, domain_in, is_accuracy, named_by
from lightning_da3.trainer.loggers import artifact_name


def test_accuracies_are_kept_over_trainers_and_evaluations(tmp_path):
    module, _ = fit(tmp_path, False)
    module, _ = fit(tmp_path, False, module, callback("b"), {"a": data(), "b": data(1)})
    known = Accuracies.of(module.net)
    assert known.order == ["a", "b"]
    first, last = known.matrix.tolist()
    assert first[0] == last[0]
    assert first[1] != first[1]  # b was not evaluated then
    flipped = data()
    flipped.dataset.tensors[1].sub_(1).abs_()
    fitter = trainer(tmp_path, callback("b"), logger=logger_of(tmp_path))
    fitter.test(module, {"a": flipped, "b": data(1)}, verbose=False)
    assert known.matrix[1, 0] == pytest.approx(1 - last[0])
    assert (tmp_path / "logs" / "da3-accuracy_matrix.png").exists()
    assert Accuracies.of(copy.deepcopy(module.net)).order == []


def test_which_metrics_are_accuracies():
    metrics = {"val/acc": 0.5, "val/loss": 0.1, "val_accuracy/b": 0.7, "train/acc/a": 1.0}
    assert accuracies_in(metrics, ["a", "b"]) == {"b": 0.7}
    assert accuracies_in(metrics, ["b", "a"]) == {"b": 0.7, "a": 0.5}
    assert accuracies_in({"acc": 92.0, "acc_epoch": 0.9}, ["a"]) == {}
    assert accuracies_in({"both/BinaryAccuracy/a": 0.25}, ["a"]) == {"a": 0.25}


@pytest.mark.parametrize(
    ("name", "best"),
    [
        ("val/acc/a", "max"),
        ("both/BinaryAccuracy/a", "max"),
        ("test_f1", "max"),
        ("train/loss/a_step", "min"),
        ("da3/peak_bytes/a", "max"),
        ("lr", None),
        ("glossary", None),
        ("accelerate", None),
    ],
)
def test_what_is_better(name, best):
    assert better(name) == best


def test_names_of_domains():
    assert named_by("loss", "a") == "loss/a"
    assert named_by("train/loss_step", "a") == "train/loss/a_step"
    assert domain_in("train/loss/a_step", ["b", "a"]) == "a"
    assert domain_in("loss/bb", ["b", "a"]) is None
    assert is_accuracy("val/MulticlassAccuracy")
    assert not is_accuracy("train/acc")


def test_names_of_artifacts_are_what_wandb_takes():
    about = {"network": "Résnet (x)", "backbone": "0123456789"}
    assert artifact_name("my/project", about, "flowers") == "my_project-R_snet__x_-01234567-flowers"
    assert len(artifact_name("p" * 300, {}, "d" * 100)) == 128
