"""``lightning-da3 export``: a network's name and a domain's file become a file for a device."""

import json
import re
import textwrap

import pytest
import torch
from helpers.domains import shake_

from lightning_da3 import AdapterConfig, DA3Config, convert
from lightning_da3.cli import main
from lightning_da3.cli.networks import factory_of

CONFIG = DA3Config(AdapterConfig(hidden_channels=4, max_cells=16, min_stride=1), None)


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module with a factory, in the folder where the command runs."""
    monkeypatch.chdir(tmp_path)
    source = """
    import torch
    from torch import nn

    def net():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(8, 5),
        )

    def double(output, targets):
        return 2 * nn.functional.cross_entropy(output, targets)

    words = nn.Sequential(nn.Identity())
    """
    (tmp_path / "exported_by_users.py").write_text(textwrap.dedent(source))
    return "exported_by_users"


@pytest.fixture
def learned(mine, tmp_path):
    """A model with a domain that adds something, in a file."""
    model = convert(factory_of(f"{mine}:net")().eval(), CONFIG)
    model.add_domain("flowers", num_classes=3)
    shake_(model, "flowers")
    model.save_domain("flowers", tmp_path / "flowers.safetensors")
    model.set_domain("flowers")
    return model.eval()


def said_by(path):
    return json.loads(path.with_name(f"{path.name}.json").read_text())


@pytest.mark.slow
def test_the_inference_of_a_domain(mine, learned, tmp_path, capsys):
    arguments = ["export", f"{mine}:net", "--domain", "flowers.safetensors", "--size", "16"]
    assert main([*arguments, "--format", "pt2", "-o", "flowers.pt2"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("flowers.pt2: inference of the domain 'flowers', ")
    assert "takes input ['batch', 3, 16, 16] and 0 more." in said
    x = torch.randn(3, 3, 16, 16)
    (found,) = torch.export.load(tmp_path / "flowers.pt2").module()(x)
    with torch.no_grad():
        torch.testing.assert_close(found, learned(x))


@pytest.mark.slow
def test_a_backbone_with_weights_of_a_file(mine, tmp_path, capsys):
    network = factory_of(f"{mine}:net")()
    with torch.no_grad():
        network[0].weight.mul_(2)
    torch.save(network.state_dict(), tmp_path / "state.pt")
    arguments = ["export", f"{mine}:net", "--state", "state.pt", "--size", "16", "-o", "net.pt2"]
    assert main([*arguments, "--format", "pt2", "--batch-size", "1"]) == 0
    assert "of the backbone alone" in capsys.readouterr().out
    x = torch.randn(1, 3, 16, 16)
    (found,) = torch.export.load(tmp_path / "net.pt2").module()(x)
    torch.testing.assert_close(found, network.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_step_of_training_of_a_fresh_domain(mine, tmp_path, capsys):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    from lightning_da3.device import Learner

    arguments = ["export", f"{mine}:net", "--num-classes", "3", "--size", "16", "-o", "step.onnx"]
    more = ["--training", "--optimizer", "adam", "--accumulate", "--loss", f"{mine}:double"]
    assert main([*arguments, *more]) == 0
    assert "training of the domain 'new'" in capsys.readouterr().out
    about = said_by(tmp_path / "step.onnx")
    assert (about["loss"], about["optimizer"]["name"], about["accumulate"]) == (
        *("double", "adam"),
        True,
    )
    learner, x = Learner(tmp_path / "step.onnx"), torch.randn(4, 3, 16, 16).numpy()
    losses = [learner.step(x, [0, 1, 2, 0], 0.01) for _ in range(5)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet18"], "random weights here.*`--state FILE`"),
        (["{mine}:net", "--training"], "`--domain FILE`, or begin a fresh one, `--num-classes N`"),
        (["{mine}:net", "--optimizer", "adam"], "need `--training`"),
        (["{mine}:net", "--accumulate"], "need `--training`"),
        (["{mine}:net", "--training", "--num-classes", "3", "--loss", "mse"], "`--loss` must be"),
        (
            ["{mine}:net", "--training", "--num-classes", "3", "--loss", "{mine}:triple"],
            "has no 'triple'",
        ),
        (
            ["{mine}:net", "--training", "--num-classes", "3", "--domains", "inputs"],
            "takes its domain as input",
        ),
        (["{mine}:net", "--domain", "a", "--num-classes", "3"], "is of a fresh domain"),
        (["{mine}:net", "--domain", "nowhere.safetensors"], "Cannot read the domain file"),
        (["{mine}:net", "--domains", "inputs"], "domains='inputs' needs a domain"),
        (["{mine}:net", "--state", "nowhere.pt"], "--state: cannot read 'nowhere.pt'"),
        (["{mine}:net", "--state", "text.pt"], "--state: cannot read 'text.pt'"),
        (["{mine}:net", "--state", "other.pt"], "does not fit"),
        (["{mine}:net", "--state", "list.pt"], "holds no state dict"),
        (["{mine}:net", "--output", "nowhere/a.pt2"], "there is no folder"),
        (["{mine}:net", "--size", "0"], "at least 1"),
        (["{mine}:net", "--batch-size", "0"], "at least 1"),
        (["{mine}:nett"], "Near it: net"),
    ],
)
def test_what_is_wrong_ends_with_a_line(arguments, message, mine, tmp_path, capsys):
    (tmp_path / "text.pt").write_text("no weights")
    torch.save({"0.weight": torch.ones(1)}, tmp_path / "other.pt")
    torch.save([torch.ones(1)], tmp_path / "list.pt")
    before = sorted(tmp_path.iterdir())
    words = [argument.format(mine=mine) for argument in arguments]
    with pytest.raises(SystemExit) as ended:
        main(["export", "--output", "a.pt2", "--format", "pt2", *words])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("lightning-da3: error: ")
    assert re.search(message, error, re.DOTALL), error
    assert [p for p in sorted(tmp_path.iterdir()) if p.name != "__pycache__"] == before


@pytest.mark.slow
def test_a_domain_of_another_backbone(mine, learned, capsys):
    learned.add_domain("other", num_classes=2)
    state = factory_of(f"{mine}:net")().state_dict()
    torch.save({name: 2 * tensor for name, tensor in state.items()}, "state.pt")
    arguments = ["export", f"{mine}:net", "--state", "state.pt", "-o", "a.onnx"]
    with pytest.raises(SystemExit):
        main([*arguments, "--domain", "flowers.safetensors"])
    assert "learned on another backbone" in capsys.readouterr().err
