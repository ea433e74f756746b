"""What one training step costs, and how it is printed."""

import time

import pytest
import torch
from torch import nn


def test_costs_of_a_step():
    from measure import Step, costs, fastest

    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 2))
    images, labels = torch.rand(5, 3, 2, 2), torch.tensor([0, 1, 0, 1, 0])
    steps = {"a": Step(network, images, labels, torch.optim.SGD)}
    (cost,) = costs(steps, rounds=2).values()
    assert cost.saved_bytes == 5 * 12 * 4 + 5 * 8 * 4 + 5 * 2 * 4 + 5 * 8 + 4  # and the loss's own
    assert cost.peak_bytes > 0
    assert cost.time_ms > 0
    assert cost.flops == 2 * 5 * (2 * 12 * 8 + 3 * 8 * 2)  # the images need no gradient
    assert fastest({"a": cost}, "a") == "a"


def test_alternating_takes_turns():
    from measure import alternate

    calls = []
    alternate({name: lambda name=name: calls.append(name) for name in "ab"}, rounds=5)
    first, second = 1 + 3, 1 + 2  # one of a turn is not timed
    assert calls == [*"a" * first, *"b" * first, *"a" * second, *"b" * second]


def test_medians_by_the_clock_and_of_the_process():
    from measure import alternate

    naps = iter([0.03, 0.001, 0.001, 0.03])
    time_ms = alternate({"nap": lambda: time.sleep(next(naps))}, rounds=3)["nap"]
    assert time_ms.wall_ms >= 1
    assert time_ms.cpu_ms < time_ms.wall_ms


@pytest.mark.slow
def test_measure_prints_what_was_asked_beside_what_was_measured(capsys):
    import measure

    assert measure.measure("resnet18", batch_size=2, image_size=32, rounds=1)
    assert not measure._row("saved", 10.0, 2.0, 6.0)
    assert measure._row("saved", 10.0, 2.0, 5.0)
    printed = capsys.readouterr().out
    assert "parameters, head apart" in printed
    assert printed.splitlines()[-2].split()[-3:] == ["5.0x", ">=6x", "FAIL"]
    assert printed.splitlines()[-1].split()[-3:] == ["5.0x", ">=5x", "pass"]


def test_flops_of_a_step_by_hand():
    from measure import Step, sgd, step_flops

    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, groups=1), nn.Flatten(), nn.Linear(64, 5))
    step = Step(network, torch.rand(2, 3, 4, 4), torch.tensor([0, 1]), sgd)
    conv, linear = 2 * 2 * 16 * 4 * 27, 2 * 2 * 64 * 5
    # the images need no gradient
    assert step_flops(step) == 2 * conv + 3 * linear


def test_the_processor_is_named():
    from measure import processor

    assert "thread" in processor()
    assert torch.__version__ in processor()
