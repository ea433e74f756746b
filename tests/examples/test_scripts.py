"""Scripts that have no parts to test: whole runs."""

import pytest
from helpers.examples import EXAMPLES, start


def test_the_quickstart_stays_short():
    assert len((EXAMPLES / "quickstart.py").read_text().splitlines()) <= 40


@pytest.mark.exhaustive
def test_quickstart(tmp_path):
    process = start("quickstart.py", folder=tmp_path)
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 0, printed
    assert "kept for the backward pass" in printed
    assert (tmp_path / "outputs" / "quickstart" / "digits.safetensors").exists()


@pytest.mark.exhaustive
def test_the_cli(tmp_path):
    pytest.importorskip("jsonargparse")
    process = start("cli.py", "fit", "--trainer.limit_train_batches", "3", folder=tmp_path)
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 0, printed
    assert (tmp_path / "outputs" / "cli" / "digits.safetensors").exists()
    assert "hidden_channels: 12" in (tmp_path / "outputs" / "cli" / "config.yaml").read_text()


@pytest.mark.exhaustive
def test_budget(tmp_path):
    process = start("budget.py", "--quick", folder=tmp_path)
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 0, printed
    assert "pieces of" in printed
    assert "gradients add up" in printed
    assert not list(tmp_path.iterdir())
