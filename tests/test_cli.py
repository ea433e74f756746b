"""The command: what training will cost, for people and for programs."""

import json
import re
import subprocess
import sys
import textwrap
from functools import partial

import pytest
import torch
from helpers.predicted import Net
from torch import nn

import lightning_da3
from lightning_da3.cli import main
from lightning_da3.cli.networks import factory_of, network_without_values


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module with a factory, in the folder where the command runs."""
    monkeypatch.chdir(tmp_path)
    source = """
    import torch
    from torch import nn

    def net():
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
        )
        nn.init.trunc_normal_(net[0].weight)
        return net

    def fails():
        raise ValueError("no such width")

    def number():
        return 3

    def leaves():
        raise SystemExit(3)

    def huge():
        return nn.Sequential(nn.Linear(10**6, 10**6), nn.ReLU(), nn.Linear(10**6, 2))
    """
    (tmp_path / "mine_of_users.py").write_text(textwrap.dedent(source))
    return "mine_of_users"


def run(capsys, *arguments):
    assert main(["plan", *arguments]) == 0
    return capsys.readouterr().out


def test_json_for_programs(mine, capsys):
    said = json.loads(
        run(capsys, f"{mine}:net", "--image-size", "32", "--batch-size", "4", "--format", "json")
    )
    assert said["inputs"] == [[4, 3, 32, 32]]
    for part in (said, said["finetune"]):
        for key in ("saved_activation_bytes", "peak_bytes", "domain_parameters"):
            assert part[key] > 0
    kept = sum(node["saved_activation_bytes"] for node in said["nodes"])
    assert kept == said["saved_activation_bytes"] < said["finetune"]["saved_activation_bytes"]


def test_exact_and_text(mine, capsys):
    text = run(capsys, f"{mine}:net", "--image-size", "32", "--exact", "--head", "none")
    assert "one training step on 1 x 3 x 32 x 32" in text


def test_the_summary_stands_first_and_nodes_are_asked_for(mine, capsys):
    short = run(capsys, f"{mine}:net", "--image-size", "32")
    whole = run(capsys, f"{mine}:net", "--image-size", "32", "--nodes")
    assert "kept for the backward" in short
    assert "flops fwd" not in short.lower()
    assert len(whole.split("\n")) > len(short.split("\n")) + 5
    assert whole.startswith(short[: short.index("`--nodes`")])


@pytest.mark.slow
def test_options_reach_the_config(mine, capsys):
    arguments = (f"{mine}:net", "--image-size", "32", "--format", "json")
    plain = json.loads(run(capsys, *arguments))
    more = json.loads(run(capsys, *arguments, "--num-classes", "100"))
    assert more["domain_parameters"] == plain["domain_parameters"] + 95 * (8 + 1)
    gated = json.loads(run(capsys, *arguments, "--gates"))
    assert gated["domain_file_bytes"] != plain["domain_file_bytes"]
    assert json.loads(run(capsys, *arguments, "--no-gates")) == plain
    assert json.loads(run(capsys, *arguments, "--min-stride", "1"))["hosts"] >= plain["hosts"]
    assert json.loads(run(capsys, *arguments, "--min-stride", "auto")) == plain
    assert json.loads(run(capsys, *arguments, "--min-depth", "1.0"))["hosts"] < plain["hosts"]
    run(capsys, *arguments, "--weights", "bfloat16")
    huge = ("--batch-size", "8", "--budget", "1GiB", "--split", "accumulate")
    assert json.loads(run(capsys, *arguments, *huge))["accumulated"]


def test_the_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"lightning-da3 {lightning_da3.__version__}\n"


def test_a_picture_of_the_step(mine, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    run(capsys, f"{mine}:net", "--image-size", "32", "--plot", "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_parameters_take_no_memory(mine, capsys):
    text = run(capsys, f"{mine}:huge")  # 4 TB
    assert "GiB" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet51"], "Near it: .*resnet50"),
        (["{mine}:nett"], "Near it: net"),
        (["nowhere_at_all:net"], "cannot be imported"),
        (["{mine}:fails"], "ValueError: no such width"),
        (["{mine}:number"], "makes a int"),
        (["{mine}:net", "--image-size", "32", "32", "32"], "one number or 2"),
        (["{mine}:net", "--batch-size", "0"], "at least 1"),
        (["{mine}:net", "--head", "classifier"], "no Linear or convolution named"),
        (["{mine}:net", "--plot", "nowhere/plan.png"], "there is no folder"),
        (["{mine}:net", "--plot", "plan.nonsense"], "cannot write"),
        (["{mine}:net", "--plot", ""], "--plot: '' is no file"),
        (["{mine}:net", "--plot", " "], "--plot: ' ' is no file"),
        (["{mine}:net", "--plot", "."], "--plot: '.' is no file"),
        (["{mine}:leaves"], "cannot be made: SystemExit: 3"),
        (["{mine}:net", "--budget", "²"], "`budget` must be bytes"),
        (["{mine}:net", "--budget", "9" * 400], "`budget` must be bytes"),
        (["{mine}:net", "--budget", "9" * 5000], "`budget` must be bytes"),
        (["{mine}:net", "--budget", ""], "`budget` must be bytes"),
        (["{mine}:net", "--budget", "-1"], "`budget` must be bytes"),
        (["{mine}:net", "--min-stride", "x"], "`min_stride` must be"),
        (["{mine}:net", "--min-depth", "1.5"], "`min_depth` must be"),
        (["{mine}:net", "--num-classes", "0"], "at least 1"),
        (["{mine}:net", "--num-classes", "3", "--head", "none"], "Leave `num_classes` out"),
        (["{mine}:net", "--split", "pieces"], "give `--budget`"),
        (["{mine}:net", "--head", ""], "`head` must be"),
        (["{mine}:net", "--batch-size", "9" * 400], "at least 1"),
        (["{mine}:net", "--image-size", "-3"], "at least 1"),
        ([""], "no network ''"),
        ([":"], "cannot be imported"),
        (["{mine}:"], "has no ''"),
    ],
)
def test_bad_input_ends_with_exit_code_2(arguments, message, mine, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["plan", *[argument.format(mine=mine) for argument in arguments]])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("lightning-da3: error: ")
    assert re.search(message, error), error


@pytest.mark.slow
def test_networks_of_torchvision_are_found(capsys):
    torchvision = pytest.importorskip("torchvision")
    said = json.loads(run(capsys, "resnet18", "--image-size", "64", "--format", "json"))
    assert said["network"] == "ResNet"
    real = sum(p.numel() for p in torchvision.models.resnet18().parameters())
    assert said["finetune"]["domain_parameters"] == real


def test_values_are_no_part_of_what_the_command_builds():
    network = network_without_values(Net, "Net")
    assert sum(p.numel() for p in network.parameters()) == sum(
        p.numel() for p in Net().parameters()
    )
    with pytest.raises(RuntimeError):
        next(network.parameters()).numpy()


@pytest.mark.exhaustive
def test_the_command_holds_to_a_budget(capsys):
    arguments = ["plan", "mobilenet_v2", "--image-size", "96", "--batch-size", "32"]
    assert main([*arguments, "--format", "json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert (whole["budget_bytes"], whole["parts"]) == (None, [])
    assert main([*arguments, "--budget", str(whole["peak_bytes"] * 19 // 20)]) == 0
    assert "the batch goes through the network in" in capsys.readouterr().out
    budget = whole["peak_bytes"] * 19 // 20
    assert main([*arguments, "--budget", f"{budget}", "--format", "json"]) == 0
    held = json.loads(capsys.readouterr().out)
    assert held["budget_bytes"] == budget >= held["peak_bytes"]
    assert sum(held["parts"]) == 32
    with pytest.raises(SystemExit):
        main([*arguments, "--budget", "1KiB"])
    error = capsys.readouterr().err
    assert "cannot be held. The smallest is" in error
    with pytest.raises(SystemExit):
        main([*arguments, "--budget", "much"])
    assert "`budget` must be bytes" in capsys.readouterr().err


def drawn():
    """A network whose constructor computes with numbers, as those with drop path rates do."""
    rates = [rate.item() for rate in torch.linspace(0, 0.3, 4)]
    layers = [layer for rate in rates for layer in (nn.Linear(300, 300), nn.Dropout(rate))]
    large = nn.Linear(1000, 1000)
    nn.init.trunc_normal_(large.weight)
    assert large.weight.max().item() == 0  # a question about a value that is not there
    return nn.Sequential(nn.Linear(1000, 300), *layers, large)


def test_what_constructors_compute_with_is_real():
    network = network_without_values(drawn, "drawn")
    rates = [layer.p for layer in network if isinstance(layer, nn.Dropout)]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert not any(type(p) is torch.Tensor for p in network.parameters())
    assert nn.Parameter.__new__(nn.Parameter, torch.ones(1)).item() == 1  # nothing is patched


@pytest.mark.parametrize("name", ["resnet50", "vit_b_16", "swin_t", "convnext_tiny"])
def test_networks_of_all_kinds_are_built(name):
    torchvision = pytest.importorskip("torchvision")
    network = network_without_values(factory_of(name), name)
    with torch.device("meta"):
        real = torchvision.models.get_model(name, weights=None)
    assert [(k, p.shape) for k, p in network.named_parameters()] == [
        (k, p.shape) for k, p in real.named_parameters()
    ]


def test_a_network_of_timm_with_drop_path_rates_is_built():
    timm = pytest.importorskip("timm")
    name = "swinv2_tiny_window8_256"
    network = network_without_values(partial(timm.create_model, name, drop_path_rate=0.2), name)
    rates = [m.drop_prob for m in network.modules() if type(m).__name__ == "DropPath"]
    assert max(rates) == pytest.approx(0.2)


PEAK = """
import resource, sys
import lightning_da3
from lightning_da3.cli.networks import factory_of, network_without_values
factory = factory_of(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
network = network_without_values(factory, sys.argv[1])
assert sum(p.numel() for p in network.parameters()) > 6e8
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss is the system's own")
@pytest.mark.parametrize(
    "name", [pytest.param("vit_h_14", marks=pytest.mark.exhaustive), "regnet_y_128gf"]
)
@pytest.mark.slow
def test_a_huge_network_is_built_in_little_memory(name):
    pytest.importorskip("torchvision")
    found = subprocess.run([sys.executable, "-c", PEAK, name], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) < 200 * 2**10  # KiB; the weights would take 2.4 GiB
