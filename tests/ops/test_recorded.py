"""Training steps that become programs: nothing of the batch they were recorded with stays in."""

import pytest
import torch
from helpers.comparing import add
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from lightning_da3 import AdapterConfig, DA3Config, MemoryConfig, convert
from lightning_da3.ops.bits import pack_between, unpack
from lightning_da3.ops.codes import decode, encode, sample_group


def network():
    layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1), nn.Hardswish()]
    rest = [nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, 1, 1), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.ReLU6()]
    return nn.Sequential(*layers, *rest, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


@pytest.mark.parametrize(
    ("exact", "mode"),
    [
        (False, "real"),
        pytest.param(True, "real", marks=pytest.mark.slow),
        pytest.param(False, "fake", marks=pytest.mark.slow),
        pytest.param(False, "symbolic", marks=pytest.mark.exhaustive),
    ],
)
def test_a_recorded_training_step_is_right_for_another_batch(exact, mode):
    torch.manual_seed(0)
    adapter = AdapterConfig(hidden_channels=4, max_cells=16, min_stride=1)
    model = convert(network(), DA3Config(adapter, None, memory=MemoryConfig(exact=exact)))
    add(model, "a")
    model.set_domain("a")
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]

    def step(x):
        return torch.autograd.grad(model(x).square().sum(), trained)

    first, second = torch.randn(2, 2, 3, 16, 16)
    program = make_fx(step, tracing_mode=mode, _allow_non_fake_inputs=True)(first)
    for x in (first, second):
        got = torch.cat([g.flatten() for g in program(x)])
        want = torch.cat([g.flatten() for g in step(x)])
        assert (got - want).norm() <= (1e-5 if exact else 2e-2) * want.norm()


@pytest.mark.parametrize("mode", ["real", "fake"])
def test_bits_and_codes(mode):
    x, other = torch.randn(2, 3, 5, 7)

    def bits(x):
        return unpack(pack_between(x, -1.0, 1.0), x.size(), x.stride())

    def codes(x):
        group = sample_group(x)
        return decode(encode(x, group), x.size(), x.stride(), x.dtype, group)

    assert torch.equal(make_fx(bits, tracing_mode=mode)(x)(other), bits(other))
    torch.testing.assert_close(make_fx(codes, tracing_mode=mode)(x)(other), codes(other))
