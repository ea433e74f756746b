"""What each logger gets, with the real loggers and W&B offline."""

import csv
import json

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_da3 import AdapterConfig, CheckpointError, DA3Config, convert
from lightning_da3.memory import SavedActivations, predict_step
from lightning_da3.plotting.accuracies import plot_accuracy_matrix
from lightning_da3.trainer.first_steps import FirstSteps
from lightning_da3.trainer.loggers import (
    COLUMNS,
    artifact_name,
    log_domain,
    log_figure,
    log_first_steps,
    log_plan_table,
    log_summary,
    plan_rows,
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)
    )
    model = convert(network, DA3Config(adapter=AdapterConfig(min_stride=1)))
    model.add_domain("digits", num_classes=2)
    model.set_domain("digits")
    return model


@pytest.fixture
def saved(model):
    x = torch.rand(2, 3, 8, 8)
    with SavedActivations(model, inputs=x) as saved:
        output = model(x)
    del output
    return saved


@pytest.fixture
def figure():
    return plot_accuracy_matrix(torch.eye(2), ["a", "b"])


class Folder:
    """A logger that has a folder and nothing else."""

    def __init__(self, save_dir):
        self.save_dir, self.log_dir = str(save_dir), None


@pytest.fixture
def wandb_logger(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from lightning.pytorch.loggers import WandbLogger

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(project="test", save_dir=tmp_path)
    yield logger
    logger.experiment.finish()


def test_the_first_steps_become_a_picture(tmp_path, model):
    steps = FirstSteps(model)
    log_first_steps(Folder(tmp_path), None)
    log_first_steps(Folder(tmp_path), steps)
    assert not list(tmp_path.iterdir())  # nothing is predicted yet
    steps.predicted = predict_step(model, torch.rand(2, 3, 8, 8))
    log_first_steps(Folder(tmp_path), steps)
    assert (tmp_path / "memory_of_a_step.png").read_bytes().startswith(b"\x89PNG")


def test_figures_become_files(tmp_path, figure):
    log_figure(Folder(tmp_path), "after/digits", figure)
    log_figure(CSVLogger(tmp_path, name="logs", version="x"), "matrix", figure, step=3)
    for path in (tmp_path / "after-digits.png", tmp_path / "logs" / "x" / "matrix.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_a_tensorboard_logger_gets_its_own_figure(figure):
    calls = []

    class TensorBoardLogger:
        class experiment:  # noqa: N801
            @staticmethod
            def add_figure(*args, **kwargs):
                calls.append((args, kwargs))

    log_figure(TensorBoardLogger(), "matrix", figure, step=3)
    assert calls == [(("matrix", figure), {"global_step": 3, "close": False})]


def test_a_folder_that_cannot_be_made(tmp_path, figure):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="Cannot make the folder"):
        log_figure(Folder(tmp_path / "file"), "matrix", figure)


def test_every_byte_has_its_row(model, saved):
    rows = plan_rows(model.plan, saved.by_module)
    assert sum(row[-1] for row in rows) == saved.bytes
    by_place = {row[0]: row[-1] for row in rows}
    assert by_place["0"] > 0  # the first host's adapter
    assert by_place["head"] > 0
    assert by_place["elsewhere"] <= 8


def test_a_plan_inside_a_lightning_module(model, saved):
    inside = {f"net.{name}": count for name, count in saved.by_module.items() if name}
    expected = plan_rows(model.plan, {n: c for n, c in saved.by_module.items() if n})
    assert plan_rows(model.plan, inside) == expected


def test_the_plan_becomes_a_csv_file(tmp_path, model, saved):
    log_plan_table(Folder(tmp_path), model.plan, saved.by_module)
    with (tmp_path / "memory_by_layer.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert tuple(header) == COLUMNS
    assert sum(int(row[-1]) for row in rows) == saved.bytes


def test_domains_go_to_wandb_only(tmp_path):
    log_domain(Folder(tmp_path), tmp_path / "missing.safetensors", "digits")


def test_headline_numbers_are_metrics_without_wandb(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    log_summary(logger, {"accuracy": 0.5})
    assert "0.5" in (tmp_path / "metrics.csv").read_text()


@pytest.mark.filterwarnings("ignore")  # of wandb itself
@pytest.mark.slow
def test_wandb_offline(tmp_path, wandb_logger, model, saved, figure, monkeypatch):
    from lightning.pytorch.loggers import WandbLogger

    run = wandb_logger.experiment
    artifacts = []
    monkeypatch.setattr(
        run, "log_artifact", lambda *args, **kwargs: artifacts.append((args, kwargs))
    )
    model.save_domain("digits", tmp_path / "digits.safetensors", seed=3)
    logger = WandbLogger(experiment=run, prefix="digits")
    logger.log_metrics({"loss": 1.0}, step=1)
    WandbLogger(experiment=run, prefix="faces").log_metrics({"loss": 2.0}, step=1)
    log_figure(logger, "matrix", figure)
    log_plan_table(logger, model.plan, saved.by_module)
    log_summary(logger, {"accuracy": 0.5})
    log_domain(logger, tmp_path / "digits.safetensors", "digits", {"accuracy": 0.5})

    assert run.summary["accuracy"] == 0.5
    assert (run.summary["digits-loss"], run.summary["faces-loss"]) == (1.0, 2.0)
    assert list((tmp_path / "wandb").rglob("digits-matrix*.png"))
    (table,) = (tmp_path / "wandb").rglob("*memory_by_layer*.table.json")
    assert json.loads(table.read_text())["columns"] == list(COLUMNS)
    (((artifact,), named),) = [call for call in artifacts if call[0][0].type == "domain"]
    assert named == {"aliases": ["latest", "best"]}
    about = {"network": "Sequential", "backbone": model.fingerprint}
    assert artifact.name == artifact_name("test", about, "digits")
    assert artifact.type == "domain"
    assert artifact.metadata["fingerprint"] == model.fingerprint
    assert artifact.metadata["file_bytes"] == (tmp_path / "digits.safetensors").stat().st_size
    assert artifact.metadata["backbone"] == model.fingerprint
    assert artifact.metadata["accuracy"] == 0.5
    assert artifact.metadata["extra"] == {"seed": 3}
    assert list(artifact.manifest.entries) == ["digits.safetensors"]


@pytest.mark.filterwarnings("ignore")
def test_a_damaged_domain_is_no_artifact(tmp_path, wandb_logger):
    (tmp_path / "digits.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"damaged|truncated"):
        log_domain(wandb_logger, tmp_path / "digits.safetensors", "digits")
