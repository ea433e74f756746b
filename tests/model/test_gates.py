"""Gates: what they execute, and the budget that trains them."""

import pytest
import torch
from helpers import models
from helpers.comparing import assert_identical
from helpers.learned import (
    ADAPTER,
    batch,
    converted,
)
from torch import nn

from lightning_da3 import (
    DA3Config,
    GateConfig,
)
from lightning_da3.nn.gate import (
    Executed,
    budget_loss,
    executed_fraction,
    with_loss,
)
from lightning_da3.schedule import annealed_target


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_executed_fraction_by_hand():
    executed = [
        Executed(torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]], [[[1.0, 1.0], [1.0, 0.0]]]]), 300.0),
        Executed(torch.tensor([[[[1.0]]], [[[0.0]]]]), 100.0),
    ]
    # (1/4 + 3/4) / 2 of 300 and 1/2 of 100
    torch.testing.assert_close(executed_fraction(executed), torch.tensor(0.5))
    torch.testing.assert_close(executed_fraction(executed[:1] * 2), torch.tensor(0.5))
    executed[1] = Executed(torch.ones(2, 1, 1, 1), 100.0)
    torch.testing.assert_close(executed_fraction(executed), torch.tensor((150 + 100) / 400))
    torch.testing.assert_close(budget_loss(executed, 0.5), torch.tensor(0.125**2))


def test_the_target_falls_from_1_over_the_first_half():
    assert annealed_target(0.4, 0.0) == 1.0
    assert annealed_target(0.4, 0.25) == pytest.approx(0.7)
    for progress in (0.5, 0.8, 1.0):
        assert annealed_target(0.4, progress) == pytest.approx(0.4)
    values = [annealed_target(0.4, i / 20) for i in range(21)]
    assert values == sorted(values, reverse=True)


def test_executed_flops_fraction_of_a_network_by_hand():
    model = converted("a", name="ConvNorm")
    with torch.no_grad():
        first, second = model.domain("a").adapters.values()
        for adapter, logit in ((first, -1.0), (second, 1.0)):
            adapter.attend.weight.zero_()
            adapter.attend.bias.fill_(logit)
    model.set_domain("a")
    model(batch("ConvNorm"))
    first_macs, second_macs = 3 * 4 * 9 * 36, 4 * 6 * 9 * 36
    expected = second_macs / (first_macs + second_macs)
    assert model.executed_flops_fraction.item() == pytest.approx(expected)
    assert model.decided_flops_fraction is model.executed_flops_fraction
    model.set_domain(None)
    model(batch("ConvNorm"))
    assert model.executed_flops_fraction is None


@pytest.mark.parametrize("training", [True, False])
def test_without_gates_everything_runs(training):
    model = converted("a", "b", name="ConvNorm", config=DA3Config(ADAPTER, gate=None))
    model.train(training).set_domain("a")
    assert model.executed_flops_fraction is None  # nothing ran
    for run in (model, lambda x: model(x, domains=[*"ab"] * (len(x) // 2))):
        if run is model or not training:
            run(batch("ConvNorm"))
        share = model.executed_flops_fraction
        assert isinstance(share, torch.Tensor)
        assert (share.shape, share.item()) == ((), 1.0)
        assert model.decided_flops_fraction is None  # no curve for a log
    with model.disable_adapters():
        model(batch("ConvNorm"))
    assert model.executed_flops_fraction is None
    model(batch("ConvNorm"))
    assert model.executed_flops_fraction == 1.0
    model.set_domain(None)
    model(batch("ConvNorm"))
    assert model.executed_flops_fraction is None


def test_a_closed_gate_leaves_what_is_added_alone():
    config = DA3Config(ADAPTER, GateConfig(target=0.5, by="cell"), head=None)
    model = converted("a", name="ConvNorm", config=config)
    with torch.no_grad():
        for adapter in model.domain("a").adapters.values():
            adapter.attend.bias.fill_(-100.0)
            adapter.value.bias.zero_()
    model.set_domain("a")
    net = models.zoo("ConvNorm").eval()
    expected = net.fc(torch.zeros(2, 6))  # ReLU of nothing
    torch.testing.assert_close(model(batch("ConvNorm")), expected)


def test_gate_maps():
    model = converted("a", name="Depthwise")
    model.set_domain("a")
    maps = model.gate_maps(batch("Depthwise"))
    assert {name: tuple(gate.shape) for name, gate in maps.items()} == {
        "stem": (2, 1, 3, 3),  # maps of 6 x 6 on at most 16 cells
        "block.3": (2, 1, 3, 3),
    }
    for gate in maps.values():
        assert set(gate.unique().tolist()) <= {0.0, 1.0}
        assert not gate.requires_grad
    model.set_domain(None)
    assert model.gate_maps(batch("Depthwise")) == {}
    without = converted("a", config=DA3Config(adapter=ADAPTER, gate=None))
    without.set_domain("a")
    assert without.gate_maps(batch()) == {}


def test_with_loss_leaves_outputs_untouched_and_minimises_the_loss():
    x, weight = torch.randn(3, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    y = with_loss(x * 1, weight.square(), scale=0.5)
    assert_identical(y.detach(), x.detach())
    y.sum().backward()
    assert_identical(x.grad, torch.ones(3))
    assert weight.grad.item() == 0.5 * 2 * 2.0


@pytest.mark.parametrize("name", ["Residual", "DictOutput", "TwoInputsTwoOutputs"])
def test_the_budget_rides_on_the_output_while_training(name):
    head = None if name in models.WITHOUT_A_HEAD else "auto"
    heavy, light = (
        converted("a", name=name, config=DA3Config(adapter=ADAPTER, gate=gate, head=head))
        for gate in (
            GateConfig(target=0.5, weight=100.0, by="cell"),
            GateConfig(target=0.5, weight=0.0, by="cell"),
        )
    )
    light.load_state_dict(heavy.state_dict())
    x = models.inputs(name)
    for model in (heavy, light):
        model.set_domain("a")
        model.train()
    got, expected = heavy(*x), light(*x)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)

    def gate_gradient(model, outputs):
        leaves = torch.utils._pytree.tree_leaves(outputs)
        sum(leaf.sum() for leaf in leaves).backward()
        adapters = model.domain("a").adapters.values()
        return torch.cat([adapter.attend.bias.grad for adapter in adapters])

    assert not torch.allclose(gate_gradient(heavy, got), gate_gradient(light, expected))
    heavy.eval()
    heavy.zero_grad()
    light.zero_grad()
    one, other = gate_gradient(heavy, heavy(*x)), gate_gradient(light, light(*x))
    torch.testing.assert_close(one, other)  # in eval nothing is added


@pytest.mark.parametrize("target", [0.3, 0.7])
def test_training_moves_the_executed_fraction_to_its_target(target):
    gate = GateConfig(target=target, weight=20.0, by="cell")
    model = converted(config=DA3Config(adapter=ADAPTER, gate=gate))
    model.add_domain("a", 3)
    model.set_domain("a")
    model.train()
    x, labels = torch.randn(32, 3, 12, 12), torch.randint(3, (32,))
    optimizer = torch.optim.Adam(model.domain("a").parameters(), 0.01)
    steps, seen = 120, []
    for step in range(steps):
        model.set_progress(step / steps)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
        seen.append(model.executed_flops_fraction.item())
    assert seen[0] > 0.8  # a fresh domain's gates are open; only noise closes some
    model.eval()
    model(x)
    assert model.executed_flops_fraction.item() == pytest.approx(target, abs=0.1)


def test_noise_is_for_the_first_part_of_training():
    model = converted("a")
    model.set_domain("a")
    x = batch()

    def varies():
        return len({model.executed_flops_fraction.item() for _ in range(8) if model(x) is not None})

    model.train().set_progress(0.0)
    assert varies() > 1
    model.eval()
    assert varies() == 1
    model.train().set_progress(0.9)
    assert varies() == 1
    quiet = converted(
        "a", config=DA3Config(adapter=ADAPTER, gate=GateConfig(target=0.5, noise=False, by="cell"))
    )
    quiet.set_domain("a")
    quiet.train().set_progress(0.0)
    assert torch.equal(quiet(x), quiet(x))


def test_an_empty_batch_executes_all_of_nothing():
    model = converted("a")
    model.set_domain("a")
    model(batch()[:0])
    assert model.executed_flops_fraction.item() == pytest.approx(1.0)


# --- what the loss is multiplied by


def loop(multiply, *, steps=100, split=1):
    """Gradients of the gates in every step of a plain loop, and the share in the end."""
    torch.manual_seed(0)
    model = converted(
        config=DA3Config(adapter=ADAPTER, gate=GateConfig(target=0.5, noise=False, by="cell"))
    )
    model.add_domain("a", 3)
    model.set_domain("a")
    model.train()
    x, labels = torch.randn(16, 3, 12, 12), torch.arange(16) % 3
    optimizer = torch.optim.Adam(model.domain("a").parameters(), 0.01)
    gates, found = [a.attend.bias for a in model.domain("a").adapters.values()], []
    for step in range(steps):
        model.set_progress(step / steps)
        optimizer.zero_grad()
        for _ in range(split):
            loss = nn.functional.cross_entropy(model(x), labels)
            multiply.scale(loss / split).backward()
        multiply.unscale_(optimizer)
        found.append(torch.cat([gate.grad for gate in gates]))
        multiply.step(optimizer)
        multiply.update()
    return found, model.executed_flops_fraction.item(), loss.item()


def scaler(scale):
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6)


@pytest.mark.parametrize("scale", [2.0**16, 2.0**-6])
@pytest.mark.parametrize("split", [1, 4])
def test_the_budget_of_a_plain_loop_is_scaled_as_its_loss(scale, split):
    got, _, _ = loop(scaler(scale), steps=3, split=split)
    want, _, _ = loop(scaler(1.0), steps=3)
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-6)


@pytest.mark.slow
def test_gates_reach_their_target_though_the_samples_were_learned_long_before():
    _, share, loss = loop(scaler(2.0**16))
    assert loss < 0.35
    assert share == pytest.approx(0.5, abs=0.1)


def test_a_step_that_overflows_says_nothing_of_the_unit():
    y, weight = torch.randn(4, 3, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    unit = torch.zeros(())
    for grad, expected in (
        (torch.full((4, 3), float("inf")), 0.0),
        (torch.full((4, 3), float("nan")), 0.0),
        (torch.full((4, 3), 0.5), 0.5 * 4 * 1.5),
        (torch.full((4, 3), 0.01), 0.5 * 4 * 1.5 * 0.999),
    ):
        with_loss(y * 1, weight.square(), unit).backward(grad)
        assert unit.item() == pytest.approx(expected)
    assert with_loss(y[:0] * 1, weight, unit).sum().requires_grad


def test_a_loss_by_itself_is_its_unit():
    y, weight = torch.tensor(3.0, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    (8.0 * with_loss(y * 1, weight.square(), torch.zeros(()))).backward()
    assert weight.grad.item() == 8.0 * 2 * 2.0


def test_the_unit_of_a_domain_outlives_a_stop():
    model = converted("a")
    model.set_domain("a")
    assert "loss_units" not in model.get_extra_state()  # there was no loss
    model.train()
    (64.0 * nn.functional.cross_entropy(model(batch()), torch.tensor([0, 1]))).backward()
    unit = model.domain("a").loss_unit.value
    assert 16.0 < unit.item() < 64.0
    again = converted("a")
    again.load_state_dict(model.state_dict())
    assert_identical(again.domain("a").loss_unit.value, unit)


def test_the_unit_of_a_domain_moves_with_it_and_stays_as_wide():
    model = converted("a")
    model.set_domain("a")
    unit = model.domain("a").loss_unit
    for move in (lambda: model.half(), lambda: model.double()):
        move()
        assert (unit.value.dtype, unit.value.device.type) == (torch.float32, "cpu")
    model.to("meta")
    assert unit.value.device.type == "meta"
    assert "loss_units" not in model.get_extra_state()
