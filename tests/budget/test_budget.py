"""Steps held to a budget: the same gradients from pieces, and a peak that stays below."""

import copy
import dataclasses
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers.comparing import add, assert_relatively_close, mix_gates_
from torch import nn

from lightning_da3 import (
    AdapterConfig,
    ConfigError,
    DA3Config,
    DA3Error,
    GateConfig,
    InputError,
    MemoryConfig,
    accumulated,
    convert,
    step_costs,
)
from lightning_da3.budget.microbatches import Microbatches
from lightning_da3.budget.policy import MARGIN, microbatch_costs, without_budget
from lightning_da3.budget.regions import most_kept, regions_of
from lightning_da3.formatting import format_bytes
from lightning_da3.memory import (
    SavedActivations,
    StepPredictor,
    measure_step,
    saved_activation_bytes,
)
from lightning_da3.nn.recomputed import Recomputed

KIB = 2**10


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return F.relu(x + self.conv2(F.silu(self.bn(self.conv1(x)))))


class Net(nn.Module):
    """A stem, residual blocks with codes and bits, and attention over positions."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1))
        self.blocks = nn.Sequential(Block(32), Block(32))
        self.norm = nn.LayerNorm(32)
        self.fc = nn.Linear(32, 5)

    def forward(self, x):
        x = self.norm(self.blocks(self.stem(x)).flatten(2).transpose(1, 2))
        return self.fc(self.mixed(x).mean(1))

    def mixed(self, x):
        return x + F.scaled_dot_product_attention(x, x, x)


class Plain(Net):
    """No attention, whose kernel takes memory of its own that weighs in so small a network."""

    def mixed(self, x):
        return x


class Regions(nn.Module):
    """An output as large as the image, in a dict."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(3, 16, 3, 4, 1)
        self.body = Block(16)
        self.fc = nn.Conv2d(16, 3, 1)

    def forward(self, x, scale):
        y = self.fc(self.body(self.down(x))) * scale[:, None, None, None]
        return {"out": F.interpolate(y, size=x.shape[2:]), "size": 3, "none": None}


class OverTheBatch(nn.Module):
    """Every sample beside every other."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 4, 1)
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        y = self.fc(self.conv(x).mean((2, 3)))
        return y @ y.T


class Mlp(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm, self.fc1 = nn.LayerNorm(channels), nn.Linear(channels, 4 * channels)
        self.fc2 = nn.Linear(4 * channels, channels)

    def forward(self, x):
        return x + self.fc2(F.gelu(self.fc1(self.norm(x))))


class Tokens(nn.Module):
    """Five residual branches, each of which can be computed again."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, 4)
        self.blocks = nn.Sequential(*[Mlp(32) for _ in range(5)])
        self.fc = nn.Linear(32, 5)

    def forward(self, x):
        return self.fc(self.blocks(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


def converted(network, *, noise=False, target=0.3, seed=0, **memory):
    torch.manual_seed(seed)
    config = DA3Config(
        adapter=AdapterConfig(hidden_channels=4, max_cells=9, min_stride=4),
        gate=GateConfig(target=target, noise=noise),
        memory=MemoryConfig(**memory),
    )
    model = add(convert(network, config), "d")
    model.set_domain("d")
    return model.train()


def images(count=6, size=32, dtype=torch.float32):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(3)).to(dtype)


def gradients(model, x, split, **kwargs):
    model.budget_policy.split = split
    output = model(x, **kwargs)
    model.budget_policy.split = None
    output = output["out"] if isinstance(output, dict) else output
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(4)).to(output)
    trained = [p for p in model.parameters() if p.requires_grad]
    return output, torch.autograd.grad((output * weights).sum(), trained)


SPLITS = [
    Microbatches(2),
    Microbatches(4),
    Microbatches(1, 3),
    Microbatches(2, 3),
    Microbatches(2, 1),
]


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "exact", "tolerance"),
    [
        (torch.float64, True, 1e-12),
        (torch.float64, False, 1e-12),
        (torch.float32, True, 2e-5),
        (torch.float32, False, 1e-3),  # what differs by rounding may have another 8-bit code
    ],
)
def test_pieces_give_the_gradients_of_the_whole_batch(split, exact, dtype, tolerance):
    model = converted(Net(), exact=exact).to(dtype)
    x = images(dtype=dtype)
    mix_gates_(model, (x,))
    output, expected = gradients(model, x, None)
    executed = model.executed_flops_fraction
    assert 0.1 < executed < 0.9  # the gates' own loss matters
    same, found = gradients(model, x, split)
    assert_relatively_close([same], [output], tolerance)
    assert_relatively_close([model.executed_flops_fraction], [executed], tolerance)
    assert_relatively_close(found, expected, tolerance)


def test_again_means_that_nothing_is_kept():
    model, x = converted(Net()), images()
    kept = {}
    for split in (None, Microbatches(2), Microbatches(2, 2), Microbatches(1, 6)):
        model.budget_policy.split = split
        with SavedActivations(model, inputs=x) as saved:
            output = model(x)
        del output
        kept[split] = saved.bytes
    whole = kept[None]
    assert abs(kept[Microbatches(2)] - whole) <= 0.02 * whole
    assert kept[Microbatches(2, 2)] <= whole / 3 * 1.05 + x.nbytes  # the images, which exist anyway
    assert kept[Microbatches(1, 6)] <= 0.05 * whole + x.nbytes


def test_random_gates_are_drawn_again_as_they_were():
    model, x = converted(Net(), noise=True), images(dtype=torch.float64)
    model.double().set_progress(0.0)
    torch.manual_seed(1)
    _, expected = gradients(model, x, Microbatches(2))
    after = torch.rand(1)
    torch.manual_seed(1)
    _, found = gradients(model, x, Microbatches(2, 3))
    assert_relatively_close(found, expected, 1e-12)
    assert torch.equal(torch.rand(1), after)


def test_dicts_keywords_and_large_outputs():
    model, x = converted(Regions()).double(), images(dtype=torch.float64)
    scale = torch.rand(6, dtype=torch.float64, requires_grad=True)
    expected, wanted = gradients(model, x, None, scale=scale)
    for split in (Microbatches(4), Microbatches(2, 2)):
        found, same = gradients(model, x, split, scale=scale)
        assert_relatively_close([found], [expected], 1e-12)
        assert_relatively_close(same, wanted, 1e-12)
    grads = []
    for split in (None, Microbatches(2, 1)):
        model.budget_policy.split = split
        grads.append(torch.autograd.grad(model(x, scale=scale)["out"].square().sum(), scale)[0])
    assert_relatively_close([grads[1]], [grads[0]], 1e-12)
    assert model(x, scale=scale)["size"] == 3


def test_outputs_that_cannot_be_joined_are_refused():
    model = converted(OverTheBatch())
    model.budget_policy.split = Microbatches(2)
    with pytest.raises(InputError, match=r"cannot be joined.*split='accumulate'"):
        model(images(3))
    model.budget_policy.split = None
    model.budget_policy.hold(MemoryConfig(budget=40 * KIB))
    with pytest.raises(InputError, match="samples of a batch act on each other"):
        model(images(4))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("kib", [6000, 4000, 2500])
def test_a_step_stays_within_its_budget(exact, kib):
    model, x = converted(Plain(), exact=exact), images(16, 128)
    labels = torch.zeros(16, dtype=torch.long)

    def peak():
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)

        def step():
            F.cross_entropy(model(x), labels).backward()
            optimizer.step()
            optimizer.zero_grad()

        return measure_step(step, repeats=0).peak_bytes

    assert peak() > kib * KIB
    model.budget_policy.hold(MemoryConfig(budget=f"{kib} KiB"))
    assert peak() <= kib * KIB
    ((count, split),) = model.budget_policy.chosen
    assert count == 16
    assert split is not None


@pytest.mark.parametrize(
    "split",
    [Microbatches(8), Microbatches(5), Microbatches(3, 2), Microbatches(1, 9), Microbatches(4, 3)],
)
@pytest.mark.parametrize("network", [Net, Regions])
def test_predictions_are_those_of_a_step_in_pieces(network, split):
    model, x = converted(network()), images(16, 64)
    kwargs = {} if network is Net else {"scale": torch.ones(16)}
    predictor = StepPredictor(model, prepare=without_budget)
    costs = microbatch_costs(predictor, (x,), kwargs)
    said = costs.step(16, split)
    predictor.twin.budget_policy.split = split
    found = predictor(x, **kwargs)
    assert abs(said.peak_bytes / found.peak_bytes - 1) <= 0.1
    assert abs(said.saved_activation_bytes / found.saved_activation_bytes - 1) <= 0.02
    assert abs(said.flops_backward / found.flops_backward - 1) <= 0.01


def test_the_least_extra_time_is_chosen():
    model, x = converted(Net()), images(16, 64)
    costs = model.budget_policy.costs_of(model, (x,), {})
    whole = costs.peak(16, None).bytes
    assert costs.choose(16, round(whole * MARGIN) + 1) is None
    chosen = [costs.choose(16, whole * part // 100) for part in (99, 60, 30, 20)]
    extra = [costs.extra_flops(16, split) for split in chosen]
    assert extra == sorted(extra)
    assert chosen[0] == Microbatches(8)
    for part, split in zip((99, 60, 30, 20), chosen, strict=True):
        assert MARGIN * costs.peak(16, split).bytes <= whole * part / 100


# --- room to keep


def costs_of(model, x, budget):
    """The peak that was predicted, and what a step really keeps and takes."""
    model.budget_policy.hold(MemoryConfig(budget=budget))
    model(x)  # decides

    def step():
        model(x).square().mean().backward()
        model.zero_grad()

    peak = measure_step(step, repeats=0).peak_bytes
    return model.budget_policy.predicted, saved_activation_bytes(model, x), peak


@pytest.mark.parametrize("exact", [False, True])
def test_where_a_budget_has_room_more_is_kept_and_less_computed_twice(exact):
    model, x = converted(Tokens(), exact=exact), images(16, 64)
    model(x)
    least = StepPredictor(model, prepare=without_budget)(x)
    kept, flops = [least.saved_activation_bytes], [least.flops_backward]
    for part in (1.15, 1.5, 100.0):
        budget = round(MARGIN * least.peak_bytes * part)
        said, saved, peak = costs_of(model, x, budget)
        assert said.saved_activation_bytes == pytest.approx(saved, rel=1e-3)  # the loss apart
        assert peak <= budget
        kept.append(said.saved_activation_bytes)
        flops.append(said.flops_backward)
    assert kept == sorted(kept)
    assert kept[-1] > 1.2 * kept[0]
    assert flops == sorted(flops, reverse=True)
    assert flops[-1] < flops[0]
    model.budget_policy.hold(MemoryConfig())
    assert saved_activation_bytes(model, x) == pytest.approx(kept[0], rel=2e-3)  # as before


def test_what_is_kept_comes_in_the_order_of_flops_for_a_byte():
    model, x = converted(Tokens()), images(16, 64)
    predictor = StepPredictor(model, prepare=without_budget)
    least, every = (most_kept(predictor, (x,), {}, bound) for bound in (0, 1e12))
    assert least[0] == ()
    assert set(every[0]) == {region.name for region in regions_of(model.plan)}
    low, high = least[1].peak_bytes, every[1].peak_bytes
    bounds = [low + (high - low) * part // 4 for part in (1, 2, 3)]
    found = [most_kept(predictor, (x,), {}, bound)[0] for bound in bounds]
    assert len(set(found)) > 1
    for fewer, more in itertools.pairwise(found):
        assert more[: len(fewer)] == fewer


def test_what_is_kept_changes_no_exact_gradient():
    model = converted(Tokens(), exact=True).double()
    x = images(4, dtype=torch.float64)
    output, expected = gradients(model, x, None)
    model.budget_policy.hold(MemoryConfig(exact=True, budget="1GiB"))
    same, found = gradients(model, x, None)

    def stretches_of(model):
        return [m for m in model.modules() if isinstance(m, Recomputed)]

    assert any(module.kept for module in stretches_of(model))
    assert not any(module.kept for module in stretches_of(copy.deepcopy(model)))
    assert_relatively_close([same], [output], 1e-12)
    assert_relatively_close(found, expected, 1e-12)


def test_a_plan_names_what_is_kept():
    model = converted(Tokens(), budget="1GiB")
    costs = step_costs(model, 4, 64)
    regions = len(model.plan.regions)
    assert f"and room to keep {regions} of {regions} regions_of" in str(costs)
    assert len(costs.to_dict()["kept"]) == regions
    assert not [row for row in costs.rows if row.keeps == "recomputed"]
    assert costs.ours.saved_activation_bytes == sum(row.saved_bytes for row in costs.rows)


def test_an_impossible_budget_names_the_least_and_what_dominates_it():
    model, x = converted(Net(), budget="20KiB"), images(4, 64)
    with pytest.raises(ConfigError) as caught:
        model(x)
    least = model.budget_policy.costs_of(model, (x,), {}).peak(4, Microbatches(1, 3))
    assert f"smallest is {format_bytes(MARGIN * least.bytes)}" in str(caught.value)
    assert least.node.removeprefix("backbone.") in str(caught.value)
    model.budget_policy.hold(MemoryConfig(budget=round(MARGIN * least.bytes) + 1))
    model(x).sum().backward()
    assert model.budget_policy.chosen == [(4, Microbatches(1, 3))]


def test_budgets_matter_only_while_training():
    model = converted(Net(), budget="20KiB")
    with torch.no_grad():
        model(images(4, 64))
    model.set_domain(None)
    model(images(4, 64))


def test_copies_and_pickles_keep_the_budget():
    model = converted(Net(), budget="500KiB")
    model(images(16, 64))
    assert model.budget_policy.chosen
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.budget_policy.budget == "500KiB"
        assert not other.budget_policy.chosen
        other(images(16, 64))
        assert other.budget_policy.chosen == model.budget_policy.chosen


def test_what_the_device_has_free():
    model = converted(Net(), budget="auto")
    assert 2**20 < model.budget_policy.bytes_on(torch.device("cpu")) < 2**50
    with pytest.raises(ConfigError, match="is not known here"):
        model.budget_policy.bytes_on(torch.device("meta"))


def test_budgets_are_about_machines():
    budget = DA3Config(memory=MemoryConfig(budget="1.5 MiB"))
    assert budget == DA3Config()
    assert budget.to_dict() == DA3Config().to_dict()
    assert DA3Config.from_dict({"memory": {"budget": 5}}).memory.budget == 5
    for wrong in ("5 parrots", "-1MiB", 0, -5, 1.5, True, "128", ""):
        with pytest.raises(ConfigError, match="`budget` must be bytes"):
            MemoryConfig(budget=wrong)
    with pytest.raises(ConfigError, match="`split` must be 'pieces' or 'accumulate'"):
        MemoryConfig(split="halves")
    assert dataclasses.replace(budget.memory, exact=True).budget == "1.5 MiB"


# --- accumulation ---------------------------------------------------------------------------------


def loss_of(model, part):
    return F.cross_entropy(model(part[0]), part[1])


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_accumulated_gradients_are_those_of_the_whole_batch(parts):
    model = converted(Net(), split="accumulate").double()
    model.config = dataclasses.replace(model.config, gate=None)  # whose budget is every part's own
    x, labels = images(5, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    trained = [p for p in model.parameters() if p.requires_grad]
    whole = loss_of(model, (x, labels))
    expected = torch.autograd.grad(whole, trained)
    model.budget_policy.split = Microbatches(parts)
    sizes = []

    def step(part):
        sizes.append(len(part[0]))
        return {"loss": loss_of(model, part), "size": len(part[0])}

    output = accumulated(model, step, (x, labels), scale=4.0)
    assert_relatively_close([output["loss"]], [whole], 1e-12)
    found = torch.autograd.grad(3.0 * output["loss"], trained)
    assert_relatively_close(found, [3.0 * g for g in expected], 1e-12)
    assert sum(sizes) == 5
    assert max(sizes) == min(parts, 2)  # the first of a new kind is one sample
    assert output["size"] == sizes[-1]


def test_accumulating_keeps_one_part_and_holds_the_budget():
    model, x = converted(Plain(), split="accumulate"), images(16, 128)
    batch = (x, torch.zeros(16, dtype=torch.long))

    def step():
        accumulated(model, lambda part: loss_of(model, part), batch).backward()
        model.zero_grad()

    model.budget_policy.split = Microbatches(16)
    assert measure_step(step, repeats=0).peak_bytes > 2000 * KIB
    model.budget_policy.hold(MemoryConfig(budget="2000KiB", split="accumulate"))
    assert measure_step(step, repeats=0).peak_bytes <= 2000 * KIB
    costs = model.budget_policy.costs_of(model, (x,), {})
    largest = costs.largest(2000 * KIB)
    assert 1 < largest < 16
    assert costs.accumulated(largest + 1).peak_bytes * MARGIN > 2000 * KIB


def test_the_gates_budget_is_that_of_every_part():
    model = converted(Net(), split="accumulate").double()
    x, labels = images(4, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    mix_gates_(model, (x,))
    trained = [p for p in model.parameters() if p.requires_grad]
    model.gate_loss_scale = 0.5
    halves = [loss_of(model, (x[i : i + 2], labels[i : i + 2])) for i in (0, 2)]
    expected = [sum(g) for g in zip(*(torch.autograd.grad(0.5 * h, trained) for h in halves),
                                    strict=True)]  # fmt: skip
    model.gate_loss_scale = 1.0
    model.budget_policy.split = Microbatches(2)
    step = lambda part: loss_of(model, part)  # noqa: E731
    accumulated(model, step, (x, labels))  # the first of its kind begins with one sample
    found = torch.autograd.grad(accumulated(model, step, (x, labels)), trained)
    assert_relatively_close(found, expected, 1e-12)
    assert model.gate_loss_scale == 1.0


def test_lists_go_sample_by_sample():
    """As of detectors, of which no step can be predicted."""

    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def forward(self, images, targets):
            scores = self.net(torch.stack(images))
            return {"loss": F.cross_entropy(scores, torch.stack(targets))}

    model = converted(Detector(), budget="1GiB")
    batch = (list(images(3)), [torch.tensor(i) for i in (0, 1, 2)])
    with pytest.raises(ConfigError, match=r"split='accumulate'"):
        model(*batch)
    model.budget_policy.hold(MemoryConfig(budget="1GiB", split="accumulate"))
    counts = []

    def step(part):
        counts.append((len(part[0]), len(part[1])))
        return model(*part)

    with pytest.warns(UserWarning, match="not known before it"):
        accumulated(model, step, batch)["loss"].backward()
    assert counts == 3 * [(1, 1)]


def test_what_cannot_be_accumulated_is_refused():
    model = converted(Net(), split="accumulate")
    model.budget_policy.split = Microbatches(1)
    with pytest.raises(DA3Error, match="NoneType without a loss"):
        accumulated(model, lambda part: None, (images(2),))
    for batch in (5, (), {"x": 3}):
        with pytest.raises(InputError, match="cannot be split"):
            accumulated(model, lambda part: part, batch)
