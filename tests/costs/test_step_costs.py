"""What a training step of a converted network costs, beside fine-tuning."""

import copy
import pickle

import pytest
import torch
from helpers.budgets import Plain, converted
from helpers.domains import refused
from helpers.predicted import Net, domain_of
from torch import nn

import lightning_da3
from lightning_da3 import ConfigError, DA3Error, InputError, convert, step_costs
from lightning_da3.memory import predict_step
from lightning_da3.plotting import plot_step

KINDS = {"nothing", "bits", "codes", "recomputed", "kept", "head"}


def test_the_rows_add_up():
    model = domain_of(Net())
    costs = step_costs(model, 4, 64)
    assert not costs.guessed
    assert costs.inputs == ((4, 3, 64, 64),)
    assert sum(row.saved_bytes for row in costs.rows) == costs.ours.saved_activation_bytes
    assert sum(row.flops_backward for row in costs.rows) == costs.ours.flops_backward
    tuned = sum(row.finetune_saved_bytes or 0 for row in costs.rows)
    assert tuned == costs.finetune.saved_activation_bytes
    assert tuned == predict_step(Net(), torch.empty(4, 3, 64, 64)).saved_activation_bytes
    by_name = {row.name: row for row in costs.rows}
    assert by_name["stem.0"].finetune_saved_bytes == 4 * 3 * 64 * 64 * 4
    kinds = {row.keeps for row in costs.rows if row.saved_bytes}
    assert {"bits", "codes"} <= kinds <= KINDS


def test_a_domains_size_is_that_of_its_file(tmp_path):
    model = domain_of(Net())
    costs = step_costs(model, 2, 64)
    model.save_domain("d", tmp_path / "d.safetensors")
    assert costs.domain_file_bytes == (tmp_path / "d.safetensors").stat().st_size
    assert costs.domain_parameters == sum(p.numel() for p in model.domain("d").parameters())


def test_printed_costs_tell_the_guess_and_the_totals():
    text = str(step_costs(convert(Net())))
    assert "1 x 3 x 224 x 224 (guessed" in text
    assert "fine-tuning" in text
    assert "peak of DA3 at" in text


def test_copies_and_files_of_a_model_keep_its_plan():
    model = domain_of(Net())
    assert step_costs(copy.deepcopy(model), 2, 64) == step_costs(model, 2, 64)
    again = pickle.loads(pickle.dumps(model))
    assert again.plan == model.plan
    assert step_costs(again, 2, 64) == step_costs(model, 2, 64)


def test_a_pickled_model_forgets_a_network_that_cannot_be_pickled():
    class Local(Net):
        """Nobody else knows it."""

    again = pickle.loads(pickle.dumps(domain_of(Local())))
    costs = step_costs(again, 2, 64)
    assert costs.finetune is None
    assert "forgets" in str(costs)


@pytest.mark.parametrize(
    ("sizes", "error"), [((0, 64), "at least 1"), ((1, [64, 64, 64]), "one number or 2")]
)
def test_sizes_that_make_no_sense(sizes, error):
    with pytest.raises(ConfigError, match=error):
        step_costs(domain_of(Net()), *sizes)


def test_a_network_of_tokens_is_guessed_too():
    network = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 5))
    model = convert(network)
    assert step_costs(model, 3).inputs[0][0] == 3
    with pytest.raises(ConfigError, match="no convolution of its input"):
        step_costs(model, 3, image_size=32)


def test_what_the_picture_says():
    pytest.importorskip("matplotlib")
    costs = step_costs(convert(Net()), 2, 64)
    axes = plot_step(costs.ours, costs.finetune).axes[0]
    tuned, ours = axes.lines[0], axes.lines[2]
    ratio = max(tuned.get_ydata()) / max(ours.get_ydata())
    assert ratio == pytest.approx(costs.finetune.peak_bytes / costs.ours.peak_bytes)
    assert min(ours.get_xdata()) == 0
    assert max(ours.get_xdata()) == 2


def test_the_picture_shows_what_was_measured():
    pytest.importorskip("matplotlib")
    ours = step_costs(convert(Net()), 2, 64).ours
    measured = {"measured_peak_bytes": 3 * ours.peak_bytes, "measured_saved_bytes": 2**10}
    axes = plot_step(ours, **measured).axes[0]
    factor = ours.peak_bytes / max(axes.lines[0].get_ydata())
    heights = [lines.get_segments()[0][0][1] * factor for lines in axes.collections[1:]]
    assert heights == pytest.approx(list(measured.values()))
    assert axes.get_ylim()[1] > heights[0] / factor
    words = [text.get_text() for text in axes.get_legend().get_texts()]
    assert words[0].startswith("DA3 predicted: peak")
    assert words[2] == "measured: kept 1 KiB"


def test_values_of_exact_mode_are_no_codes():
    rows = step_costs(domain_of(Net(), exact=True), 4, 64).rows
    assert [row.keeps for row in rows if row.layer in ("adapter", "read again") if row.saved_bytes]
    assert "codes" not in {row.keeps for row in rows if row.saved_bytes}


def test_nothing_of_the_network_changes():
    model = convert(Net())
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    seed = torch.get_rng_state()
    str(step_costs(model, 2, 64))
    assert torch.equal(seed, torch.get_rng_state())
    assert model.domains == []
    assert model.active_domain is None
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_inputs_instead_of_sizes():
    model = domain_of(Net())
    given = step_costs(model, inputs=torch.empty(2, 3, 64, 64, device="meta"))
    assert given == step_costs(model, 2, 64)
    assert not given.guessed
    with pytest.raises(InputError, match="Net takes batches of shape"):
        step_costs(model, inputs=(torch.empty(2, 4, 64, 64),))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.fc = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x, scale):
        return self.fc(self.mix(x).relu()) * scale


def test_a_network_whose_inputs_cannot_be_guessed_says_so():
    model = convert(TwoInputs())
    with refused(DA3Error, "What TwoInputs takes is not known", "step_costs(model, inputs=(x, y))"):
        step_costs(model)
    given = (torch.empty(2, 6), torch.empty(2, 1))
    assert step_costs(model, inputs=given).inputs == ((2, 6), (2, 1))


def test_a_network_that_is_not_converted_is_refused():
    with refused(ConfigError, "must be a DA3Model, as `convert(network)` gives it, got Net"):
        step_costs(Net())


@pytest.mark.parametrize(
    ("share", "split"), [(0.8, "pieces"), (0.97, "pieces"), (0.8, "accumulate")]
)
def test_the_curve_under_a_budget_is_that_of_the_split_step(share, split):
    whole = step_costs(converted(Plain()), 8, 64).ours
    model = converted(Plain(), budget=int(share * whole.peak_bytes), split=split)
    held = step_costs(model, 8, 64)
    step = held.ours
    assert len(held.parts) > 1
    assert step.timeline != whole.timeline
    assert max(step.timeline) == step.peak_bytes < whole.peak_bytes
    assert len(step.names) == len(step.timeline)
    assert 0 < step.forward_end < step.backward_end < len(step.timeline)
    at = step.timeline.index(step.peak_bytes)
    assert (step.names[at], step.phase_at(at)) == (step.peak_node, step.peak_phase)
    (line,) = [x for x in plot_step(step).axes[0].lines if x.get_label().startswith("DA3")]
    assert max(line.get_ydata()) * 2**10 == pytest.approx(step.peak_bytes)


def test_the_number_of_classes_of_a_new_domain():
    model = convert(Net())
    fewer, more = (step_costs(model, 1, 64, num_classes=n) for n in (2, 12))
    width = model.fc.in_features
    assert more.domain_parameters - fewer.domain_parameters == 10 * (width + 1)
    with refused(ConfigError, "is active, which has its own"):
        step_costs(domain_of(Net()), 1, 64, num_classes=3)


# --- the plan, and names that moved


def test_a_plan_is_a_plain_value():
    model = convert(Net())
    assert type(model.plan).__name__ == "Plan"
    again = pickle.loads(pickle.dumps(copy.deepcopy(model.plan)))
    assert again == model.plan
    assert str(again) == str(model.plan)
    assert str(again).startswith("Net:")
    with refused(AttributeError, "no `at` any more", "`lightning_da3.step_costs(model, batch_size"):
        model.plan.at(2, 64)
    with refused(AttributeError, "'Plan' object has no attribute 'att'"):
        model.plan.att  # noqa: B018


def test_modules_that_moved_say_where_they_are():
    with refused(ImportError, "`lightning_da3.registry` moved: import `lightning_da3.layers`."):
        from lightning_da3 import registry  # noqa: F401
    with refused(AttributeError, "module 'lightning_da3' has no attribute 'nonsense'"):
        lightning_da3.nonsense  # noqa: B018
    for name, place in lightning_da3._MOVED.items():
        assert not hasattr(lightning_da3, f"{name}_")
        assert __import__(f"lightning_da3.{place}", fromlist=["x"])
