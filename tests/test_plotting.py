"""Pictures: what is drawn where. How they look is for eyes."""

import builtins
import math

import pytest
import torch
import torchvision
from torch import nn

from lightning_da3 import AdapterConfig, ConfigError, DA3Config, DA3Error, GateConfig, convert
from lightning_da3.memory import SavedActivations, predict_step
from lightning_da3.plotting.accuracies import plot_accuracy_matrix
from lightning_da3.plotting.gates import plot_executed_shares, plot_gate_maps
from lightning_da3.plotting.memory import memory_rows, plot_memory, plot_step, short
from lightning_da3.plotting.places import Place, flat, place_of


def texts(figure):
    figure.draw_without_rendering()
    found = [text for axes in figure.axes for text in axes.texts]
    return [text.get_text() for text in found]


def titles(figure):
    return [axes.get_title() for axes in figure.axes]


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("backbone.layer1.0.relu", Place("layer", "layer1_0_relu")),
        ("backbone.layer1.0.conv1", Place("layer", "layer1_0_conv1")),
        ("backbone.host_inputs.layer1__0__conv1", Place("host", "layer1_0_conv1")),
        ("backbone.host_outputs.a__block-0", Place("host", "a_block_0")),
        ("bank.digits.adapters.layer1__0__conv1.norm", Place("host", "layer1_0_conv1")),
        ("bank.digits.adapters.conv", Place("host", "conv")),
        ("bank.digits.head", Place("head", "head")),
        ("net.bank.digits.head", Place("head", "head", "net.")),
        ("net.backbone.relu", Place("layer", "relu", "net.")),
        ("", Place("", "")),
        ("backbone", Place("", "backbone")),
    ],
)
def test_place_of(name, place):
    assert place_of(name) == place


def test_flat_makes_the_three_kinds_of_names_alike():
    names = ["a.block-0.conv", "a_block_0_conv", "a__block-0__conv"]
    assert {flat(name) for name in names} == {"a_block_0_conv"}


@pytest.mark.parametrize("build", [torchvision.models.resnet18, torchvision.models.mobilenet_v2])
def test_every_byte_of_a_real_network_has_its_row(build):
    network, x = build(), torch.randn(1, 3, 64, 64)
    with SavedActivations(network, inputs=x) as before:
        output = network(x)
    del output
    model = convert(network)
    model.add_domain("digits", num_classes=10)
    model.set_domain("digits")
    with SavedActivations(model, inputs=x) as after:
        output = model(x)
    del output
    rows = memory_rows(before.by_module, after.by_module, head=model.plan.head)
    assert sum(row[0] for row in rows.values()) == before.bytes
    assert sum(row[1] for row in rows.values()) == after.bytes
    assert rows[model.plan.head][1] > 0
    assert rows.get("other", (0, 0))[1] < after.bytes / 1000
    assert len(rows) <= 25
    assert plot_memory(before.by_module, after.by_module, head=model.plan.head).axes


def test_rows_stay_in_order_and_are_put_together_until_few_are_left():
    before = {f"layer{i}.{j}.conv": 100 for i in range(3) for j in range(20)}
    after = {"backbone.layer1.2.conv": 7, "bank.d.adapters.layer2__11__conv.norm": 5}
    assert memory_rows(before, after, max_rows=10) == {
        "layer0": (2000, 0),
        "layer1": (2000, 7),
        "layer2": (2000, 5),
    }
    assert len(memory_rows(before, after, max_rows=60)) == 60


def test_rows_of_a_network_without_a_hierarchy_are_runs_of_layers():
    before = {f"conv{i}": 1 for i in range(160)}
    rows = memory_rows(before, {"backbone.conv159": 3}, max_rows=20)
    assert len(rows) == 20
    assert rows["conv152 .. conv159"] == (8, 3)


def test_a_number_in_a_name_is_not_a_prefix_of_another():
    before = {"layer1": 1, "layer10": 1}
    rows = memory_rows(before, {"backbone.layer10.relu": 5})
    assert rows == {"layer1": (1, 0), "layer10": (1, 5)}


def test_what_fits_no_layer_is_other():
    assert memory_rows({"conv": 1}, {"": 4, "elsewhere": 2}) == {"conv": (1, 0), "other": (0, 6)}


def test_names_inside_a_lightning_module():
    before = {"net.conv1": 10, "net.fc": 4}
    after = {"net.backbone.conv1": 2, "net.bank.digits.head": 3}
    assert memory_rows(before, after, head="fc") == {"net.conv1": (10, 2), "net.fc": (4, 3)}


def test_memory_says_totals_and_ratio():
    figure = plot_memory({"conv": 2**21, "fc": 0}, {"backbone.conv": 2**19})
    assert figure.get_suptitle() == (
        "DA3 keeps 4.0 times less for the backward pass: 512 KiB instead of 2 MiB"
    )
    assert texts(figure) == [" 2 MiB", " 512 KiB"]


def test_memory_when_nothing_is_kept():
    figure = plot_memory({"conv": 1024}, {})
    assert "Nothing is kept" in figure.get_suptitle()
    assert " nothing" in texts(figure)


@pytest.mark.parametrize("arguments", [({}, {}), ({"conv": 0}, {"conv": 1})])
def test_memory_without_a_before(arguments):
    with pytest.raises(ConfigError, match=r"SavedActivations\.by_module"):
        plot_memory(*arguments)


def test_lengths_compare_as_bytes_do():
    before, after = {f"c{i}": 2**21 * (i + 1) for i in range(3)}, {"backbone.c0": 2**19}
    axes = plot_memory(before, after).axes[0]
    assert axes.get_xscale() == "linear"
    lengths = [bar.get_width() for bar in axes.patches]
    assert lengths == [2.0, 4.0, 6.0, 0.5, 0.0, 0.0]
    assert axes.get_xlabel().endswith("MiB")


def test_more_than_before_is_said_too():
    figure = plot_memory({"conv": 100}, {"backbone.conv": 200})
    assert figure.get_suptitle().startswith("DA3 keeps 2.0 times more")


def step():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2))
    return predict_step(network, torch.rand(2, 3, 8, 8))


def test_the_lines_of_what_was_measured_differ():
    ours = step()
    figure = plot_step(ours, measured_peak_bytes=2 * ours.peak_bytes, measured_saved_bytes=1)
    styles = {(str(c.get_linestyle()), str(c.get_color())) for c in figure.axes[0].collections[1:]}
    assert len(styles) == 2


def test_a_step_says_where_it_peaks():
    ours = step()
    title = plot_step(ours).get_suptitle()
    assert title.startswith("A training step peaks at")
    assert f"in the {ours.peak_phase}" in title
    assert plot_step(ours, ours).get_suptitle().endswith("1.0 times below fine-tuning")


def test_long_names_of_nodes_are_cut():
    assert short("backbone.layer1.conv") == "layer1.conv"
    assert short("") == "the loss"
    assert short("block." * 20) == "..." + ("block." * 20)[-32:]


def test_gate_maps_have_captions_and_a_key():
    figure = plot_gate_maps(
        torch.rand(2, 3, 8, 8), {"h": torch.ones(2, 1, 2, 2)}, captions=["rose", "tulip"]
    )
    assert [t for t in titles(figure) if "executed" not in t] == ["input\nrose", "tulip"]
    (key,) = figure.legends
    assert [text.get_text() for text in key.get_texts()][::2] == ["executed", "skipped"]
    assert figure.get_suptitle() == "100% of the cells are executed"
    with pytest.raises(ConfigError, match="each of the 2 images, got 1"):
        plot_gate_maps(torch.rand(2, 3, 8, 8), {"h": torch.ones(2, 1, 2, 2)}, captions=["rose"])


def test_executed_shares_count_hosts_and_images():
    maps = {"early": torch.ones(2, 1, 4, 4), "late": torch.zeros(2, 1, 2, 2)}
    maps["late"][0, 0, 0] = 1
    figure = plot_executed_shares(maps)
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert heights == [1, 0, 0, 0, 0, 1, 0, 0, 0, 2]
    assert figure.get_suptitle() == (
        "62% of the cells are executed; of 2 hosts 1 run everywhere, 0 nowhere"
    )
    with pytest.raises(ConfigError, match="set_domain"):
        plot_executed_shares({})


def test_the_matrix_says_what_it_found():
    def title(*rows):
        figure = plot_accuracy_matrix(torch.tensor(rows), ["a", "b"])
        return figure.axes[0].get_title().replace("\n", " ")

    nan = math.nan
    said = "50.0 % on average after b; "
    assert title([0.8, nan], [0.6, 0.4]) == said + "at most 20.0 points forgotten"
    assert title([0.6, nan], [0.6, 0.4]) == said + "nothing forgotten"
    assert title([0.5, nan], [0.6, 0.4]) == said + "earlier ones got better"
    assert title([0.5, nan], [nan, nan]) == "50.0 % on average after a"
    assert title([nan, nan], [nan, nan]) == "Nothing was evaluated"
    bar = plot_accuracy_matrix(torch.tensor([[0.8]]), ["a"]).axes[1]
    assert bar.get_ylabel() == "colours begin at 50 %"


def test_gate_maps_tell_the_executed_share_of_every_map():
    maps = {"early": torch.ones(2, 1, 4, 4), "late": torch.zeros(2, 1, 2, 2)}
    maps["late"][0, 0, 0] = 1
    figure = plot_gate_maps(torch.randn(2, 3, 8, 8), maps)
    assert titles(figure) == [
        *("input", "all hosts, mean\n75% executed", "early\n100% executed", "late\n50% executed"),
        *("", "50% executed", "100% executed", "0% executed"),
    ]


def test_skipped_cells_are_darker_and_executed_ones_unchanged():
    gate = torch.ones(1, 1, 2, 2)
    gate[..., 0] = 0
    images = torch.linspace(0, 1, 48).reshape(1, 3, 4, 4)
    figure = plot_gate_maps(images, {"host": gate})
    shown = [torch.as_tensor(axes.images[0].get_array()) for axes in figure.axes]
    torch.testing.assert_close(shown[2][:, 2:], shown[0][:, 2:])
    assert shown[2][:, :2].mean() < 0.5 * shown[0][:, :2].mean()


def test_gate_maps_pick_hosts_from_first_to_last():
    maps = {f"host{i}": torch.ones(9, 1, 2, 2) for i in range(11)}
    figure = plot_gate_maps(torch.rand(9, 1, 6, 6), maps, max_images=2, max_hosts=3)
    assert len(figure.axes) == 2 * 5
    assert [t.split("\n")[0] for t in titles(figure)[2:5]] == ["host0", "host5", "host10"]


def test_gate_maps_of_a_converted_network():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
    model = convert(
        network, DA3Config(AdapterConfig(min_stride=1), GateConfig(target=0.5, by="cell"))
    )
    model.add_domain("a", num_classes=2)
    model.set_domain("a")
    images = torch.rand(2, 3, 8, 8)
    assert "100% executed" in titles(plot_gate_maps(images, model.gate_maps(images)))[1]


@pytest.mark.parametrize(
    ("images", "maps", "message"),
    [
        (torch.rand(1, 3, 4, 4), {}, "set_domain"),
        (torch.rand(1, 3, 4, 4), {"host": torch.ones(2, 1, 2, 2)}, "host"),
        (torch.rand(1, 5, 4, 4), {"host": torch.ones(1, 1, 2, 2)}, r"\(1, 5, 4, 4\)"),
    ],
)
def test_gate_maps_that_do_not_fit(images, maps, message):
    with pytest.raises(ConfigError, match=message):
        plot_gate_maps(images, maps)


def test_accuracy_matrix_writes_values_and_leaves_nan_blank():
    matrix = torch.tensor([[0.5, math.nan], [0.25, 1.0]])
    figure = plot_accuracy_matrix(matrix, ["digits", "faces"])
    assert texts(figure) == ["50.0", "25.0", "100.0"]


def test_accuracy_matrix_of_one_domain_and_of_nothing():
    assert texts(plot_accuracy_matrix(torch.tensor(0.5), ["digits"])) == ["50.0"]
    assert texts(plot_accuracy_matrix(torch.full((2, 2), math.nan), ["a", "b"])) == []


def test_accuracy_matrix_of_another_size():
    with pytest.raises(ConfigError, match=r"\(2, 2\)"):
        plot_accuracy_matrix(torch.zeros(3, 3), ["a", "b"])


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def fail(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(DA3Error, match=r"pip install lightning-da3\[plot\]"):
        plot_accuracy_matrix(torch.zeros(1, 1), ["a"])
