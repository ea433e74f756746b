"""Peak bytes against sums made by hand."""

import math

import pytest
import torch
from torch import nn

from lightning_da3.errors import ConfigError
from lightning_da3.memory import measure_step

KB, FLOAT = 1024, 4  # bytes


def block(kilobytes):
    return torch.empty(kilobytes * KB, dtype=torch.uint8)


def test_peak_is_the_highest_running_sum():
    def step():
        a = block(4)
        b = block(8)
        del a
        c = block(6)  # 8 + 6
        del b, c
        block(10)

    assert measure_step(step).peak_bytes == 14 * KB


def test_what_was_alive_before_the_step_does_not_matter():
    held = []

    def step():
        held.clear()  # from the step before, which the profiler saw or did not see
        held.append(block(10))
        block(5)

    expected = 15 * KB
    assert measure_step(step, warmup=0, repeats=0).peak_bytes == expected
    assert measure_step(step, warmup=0, repeats=0).peak_bytes == expected
    assert measure_step(step, warmup=1, repeats=0).peak_bytes == expected


@pytest.mark.parametrize("zero_first", [False, True])
def test_gradients_belong_to_the_peak(zero_first):
    net = nn.Linear(256, 512, bias=False)
    optimizer, x = torch.optim.SGD(net.parameters(), lr=0.1), torch.randn(1, 256)

    def step():
        if zero_first:
            optimizer.zero_grad()
        net(x).sum().backward()
        optimizer.step()
        if not zero_first:
            optimizer.zero_grad()

    weight = 512 * 256 * FLOAT
    assert weight <= measure_step(step).peak_bytes < 1.1 * weight


def test_calls_time_and_their_numbers():
    calls = []
    measured = measure_step(lambda: calls.append(1), warmup=2, repeats=3)
    assert len(calls) == 2 + 1 + 3
    assert measured.peak_bytes == 0
    assert 0 <= measured.time_ms < 1000
    assert math.isnan(measure_step(lambda: None, repeats=0).time_ms)


def test_bad_arguments_are_named():
    with pytest.raises(ConfigError, match="`warmup` must be at least 0, got -1"):
        measure_step(lambda: None, warmup=-1)
    with pytest.raises(ConfigError, match="`repeats` must be at least 0, got -2"):
        measure_step(lambda: None, repeats=-2)
    with pytest.raises(ConfigError, match="CPU or a CUDA device, got 'meta'"):
        measure_step(lambda: None, device="meta")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_on_cuda():
    def step():
        a = block(1024).cuda()
        b = block(2048).cuda()
        del a, b

    measured = measure_step(step, device="cuda")
    assert measured.peak_bytes == 3 * 1024 * KB
    assert measured.time_ms > 0
