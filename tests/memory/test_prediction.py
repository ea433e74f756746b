"""What a step will cost, known before it runs."""

import pytest
import torch
import torch.nn.functional as F
from helpers.predicted import Net, domain_of
from torch import nn

from lightning_da3 import DA3Error, InputError
from lightning_da3.memory import (
    SavedActivations,
    StepPredictor,
    measure_step,
    predict_step,
    saved_activation_bytes,
)


class Asks(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x) * (2 if float(x.sum()) > 0 else 1)


CASES = {
    "default": lambda: domain_of(Net()),
    "exact": lambda: domain_of(Net(), exact=True),
    "fine-tuning": lambda: Net().train(),
}


@pytest.mark.parametrize("case", CASES)
def test_figures_are_those_of_a_real_step(case):
    network = CASES[case]()
    x, y = torch.randn(8, 3, 64, 64), torch.zeros(8, dtype=torch.long)
    predicted = predict_step(network, x)
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1)

    def step():
        F.cross_entropy(network(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    peak = measure_step(step, repeats=0).peak_bytes
    with SavedActivations(network, inputs=x) as saved:
        loss = F.cross_entropy(network(x), y)
    del loss
    assert predicted.saved_activation_bytes == saved.bytes
    assert predicted.peak_bytes == pytest.approx(peak, rel=0.1)
    assert sum(node.saved_bytes for node in predicted.nodes) == saved.bytes
    assert max(predicted.timeline) == predicted.peak_bytes
    assert predicted.timeline[predicted.forward_end - 1] >= saved.bytes - x.nbytes


def test_nothing_of_the_network_changes():
    model = domain_of(Net())
    before = {name: p.clone() for name, p in model.state_dict().items() if hasattr(p, "clone")}
    seed = torch.get_rng_state()
    predict_step(model, torch.empty(2, 3, 64, 64, device="meta"))
    assert torch.equal(seed, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], model.state_dict()[name]) for name in before)
    assert saved_activation_bytes(model, torch.randn(2, 3, 64, 64)) > 0  # real again


def test_flops_are_counted_by_pass():
    network = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.Flatten(), nn.Linear(512, 3)
    )
    predicted = predict_step(network, torch.empty(2, 4, 8, 8))
    conv, linear = 2 * 2 * 8 * 64 * 2 * 9, 2 * 2 * 512 * 3
    assert predicted.flops_forward == conv + linear
    assert predicted.flops_backward == conv + 2 * linear  # the input needs no gradient


def test_every_batch_size_follows_from_two():
    predictor = StepPredictor(domain_of(Net()))
    sizes = predictor.by_batch(torch.empty(1, 3, 64, 64))
    for count in (1, 3, 16):
        real, line = predictor(torch.empty(count, 3, 64, 64)), sizes.at(count)
        assert line.peak_bytes == pytest.approx(real.peak_bytes, rel=0.01)
        assert line.saved_activation_bytes == pytest.approx(real.saved_activation_bytes, rel=0.01)
        assert line.flops_forward == real.flops_forward
    peak = sizes.at(7).peak_bytes
    assert sizes.largest(peak) == 7
    assert sizes.largest(peak - 1) == 6
    assert sizes.largest(1) == 0


def test_an_optimizers_state_belongs_to_the_resting_model():
    network = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 2))
    plain = predict_step(network, torch.empty(2, 512))
    momentum = predict_step(
        network, torch.empty(2, 512), optimizer=lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)
    )
    assert momentum.peak_bytes == pytest.approx(plain.peak_bytes, rel=0.05)


def test_what_cannot_be_predicted_says_why():
    with pytest.raises(InputError, match=r"Net cannot make a training step .*\(2, 4, 64, 64\)"):
        predict_step(Net(), torch.empty(2, 4, 64, 64))
    with pytest.raises(DA3Error, match="Nothing of Net requires a gradient"):
        predict_step(Net().requires_grad_(False), torch.empty(2, 3, 64, 64))
    with pytest.raises(DA3Error, match=r"decides by values.*measure_step"):
        predict_step(Asks(), torch.empty(2, 4))
<<<<<<< HEAD
=======


# --- the plan -------------------------------------------------------------------------------------


def test_the_plan_adds_up():
    model = domain_of(Net())
    costs = model.plan.at(4, 64)
    assert not costs.guessed
    assert costs.inputs == ((4, 3, 64, 64),)
    assert sum(row.saved_bytes for row in costs.rows) == costs.ours.saved_activation_bytes
    assert sum(row.flops_backward for row in costs.rows) == costs.ours.flops_backward
    tuned = sum(row.finetune_saved_bytes or 0 for row in costs.rows)
    assert tuned == costs.finetune.saved_activation_bytes
    assert tuned == predict_step(Net(), torch.empty(4, 3, 64, 64)).saved_activation_bytes
    by_name = {row.name: row for row in costs.rows}
    assert by_name["stem_0"].finetune_saved_bytes == 4 * 3 * 64 * 64 * 4
    kinds = {row.keeps for row in costs.rows if row.saved_bytes}
    assert "bits" in kinds
    assert "codes" in kinds


def test_a_domains_size_is_that_of_its_file(tmp_path):
    model = domain_of(Net())
    costs = model.plan.at(2, 64)
    model.save_domain("d", tmp_path / "d.safetensors")
    assert costs.domain_file_bytes == (tmp_path / "d.safetensors").stat().st_size
    assert costs.domain_parameters == sum(p.numel() for p in model.domain("d").parameters())


def test_a_printed_plan_tells_the_guess_and_the_totals():
    text = str(convert(Net()).plan)
    assert "1 x 3 x 224 x 224 (guessed" in text
    assert "fine-tuning" in text
    assert "peak of DA3 at" in text


def test_copies_and_files_of_a_model_keep_its_plan():
    model = domain_of(Net())
    assert copy.deepcopy(model).plan.at(2, 64) == model.plan.at(2, 64)
    again = pickle.loads(pickle.dumps(model))
    assert again.plan == model.plan
    costs = again.plan.at(2, 64)
    assert costs.finetune is None
    assert "forgets" in str(costs)
    assert str(pickle.loads(pickle.dumps(model.plan))).startswith("Net:")


@pytest.mark.parametrize(
    ("sizes", "error"), [((0, 64), "at least 1"), ((1, [64, 64, 64]), "one number or 2")]
)
def test_sizes_that_make_no_sense(sizes, error):
    with pytest.raises(ConfigError, match=error):
        domain_of(Net()).plan.at(*sizes)


def test_a_network_of_tokens_is_guessed_too():
    network = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 5))
    model = convert(network)
    assert model.plan.at(3).inputs[0][0] == 3
    with pytest.raises(ConfigError, match="no convolution of its input"):
        model.plan.at(3, image_size=32)


# --- the command ----------------------------------------------------------------------------------


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


def test_a_picture_of_the_step(mine, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    run(capsys, f"{mine}:net", "--image-size", "32", "--plot", "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_what_the_picture_says():
    pytest.importorskip("matplotlib")
    costs = convert(Net()).plan.at(2, 64)
    axes = plot_step(costs.ours, costs.finetune).axes[0]
    tuned, ours = axes.lines[0], axes.lines[2]
    ratio = max(tuned.get_ydata()) / max(ours.get_ydata())
    assert ratio == pytest.approx(costs.finetune.peak_bytes / costs.ours.peak_bytes)
    assert min(ours.get_xdata()) == 0
    assert max(ours.get_xdata()) == 2


def test_the_picture_shows_what_was_measured():
    pytest.importorskip("matplotlib")
    ours = convert(Net()).plan.at(2, 64).ours
    measured = {"measured_peak_bytes": 3 * ours.peak_bytes, "measured_saved_bytes": 2**10}
    axes = plot_step(ours, **measured).axes[0]
    factor = ours.peak_bytes / max(axes.lines[0].get_ydata())
    heights = [lines.get_segments()[0][0][1] * factor for lines in axes.collections[1:]]
    assert heights == pytest.approx(list(measured.values()))
    assert axes.get_ylim()[1] > heights[0] / factor
    words = [text.get_text() for text in axes.get_legend().get_texts()]
    assert words[0].startswith("DA3 predicted: peak")
    assert words[2] == "measured: kept 1 KiB"


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
    ],
)
def test_bad_input_ends_with_exit_code_2(arguments, message, mine, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["plan", *[argument.format(mine=mine) for argument in arguments]])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("lightning-da3: error: ")
    assert re.search(message, error), error


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


def test_the_command_holds_to_a_budget(capsys):
    arguments = ["plan", "mobilenet_v2", "--image-size", "96", "--batch-size", "32"]
    assert main([*arguments, "--format", "json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert (whole["budget_bytes"], whole["parts"]) == (None, [])
    assert main([*arguments, "--budget", str(whole["peak_bytes"] * 3 // 4)]) == 0
    assert "the batch goes through the network in" in capsys.readouterr().out
    budget = whole["peak_bytes"] * 3 // 4
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
>>>>>>> h_docs
