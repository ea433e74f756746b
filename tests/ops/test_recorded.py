"""Training steps that become programs: nothing of the batch they were recorded with stays in."""

import pytest
import torch
from helpers import skips
from helpers.comparing import add
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from lightning_da3 import AdapterConfig, DA3Config, GateConfig, MemoryConfig, convert
from lightning_da3.ops.bits import pack_between, unpack
from lightning_da3.ops.codes import decode, encode, sample_group


def network():
    layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1), nn.Hardswish()]
    rest = [nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, 1, 1), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.ReLU6()]
    return nn.Sequential(*layers, *rest, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


def around(*layers):
    """Convolutions of eight channels with these between them, and a head."""
    between = [nn.Sequential(layer, nn.Conv2d(8, 8, 3, 1, 1)) for layer in layers]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)]
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), *between, *head)


class Excited(nn.Module):
    """A depthwise block with squeeze-and-excitation."""

    def __init__(self):
        super().__init__()
        self.widen, self.norm = nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.narrow = nn.Conv2d(16, 8, 1)

    def forward(self, x):
        y = nn.functional.silu(self.depthwise(nn.functional.silu(self.norm(self.widen(x)))))
        scale = self.excite(nn.functional.silu(self.squeeze(y.mean((2, 3), keepdim=True))))
        return x + self.narrow(y * torch.sigmoid(scale))


NETWORKS = {
    "mixed": network,
    "kinks": lambda: around(nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.1), nn.Hardsigmoid()),
    "pools": lambda: around(nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(2)),
    "smooth": lambda: around(nn.GELU(), nn.Hardswish(), nn.ELU(), nn.Tanh(), nn.Mish()),
    "norms": lambda: around(nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.InstanceNorm2d(8)),
    "excitation": lambda: around(Excited(), Excited()),
    "tokens": lambda: skips.Net(skips.Tokens(), skips.Tokens()),
}
LAST = torch.channels_last


def recorded(make, exact, mode, gate, layout=torch.contiguous_format):
    """A training step's gradients, recorded with one batch, far from eager's for others."""
    torch.manual_seed(0)
    adapter = AdapterConfig(hidden_channels=4, max_cells=16, min_stride=1, min_depth=0)
    config = DA3Config(adapter, gate, memory=MemoryConfig(exact=exact))
    model = convert(make().to(memory_format=layout), config)
    add(model, "a")
    model.set_domain("a")
    model.train().gate_loss_scale = 1.0  # else it is that of the step before
    with torch.no_grad():
        for parameter in model.domain("a").parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    trained = [p for p in model.parameters() if p.requires_grad]

    def step(x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(model(x).square().sum(), [x, *trained])

    first, second = (x.contiguous(memory_format=layout) for x in torch.randn(2, 2, 3, 16, 16))
    program = make_fx(step, tracing_mode=mode, _allow_non_fake_inputs=True)(first)
    for x in (first, second):
        got, want = (torch.cat([g.flatten() for g in run(x)]) for run in (program, step))
        assert (got - want).norm() <= (1e-5 if exact else 2e-2) * want.norm()
    return model, program, second


@pytest.mark.parametrize(
    ("exact", "mode"),
    [
        (False, "real"),
        pytest.param(True, "real", marks=pytest.mark.slow),
        pytest.param(False, "fake", marks=pytest.mark.slow),
        (True, "fake"),
        pytest.param(False, "symbolic", marks=pytest.mark.exhaustive),
        pytest.param(True, "symbolic", marks=pytest.mark.exhaustive),
    ],
)
def test_a_recorded_training_step_is_right_for_another_batch(exact, mode):
    recorded(network, exact, mode, None)


@pytest.mark.parametrize(
    "gate", [None, GateConfig(target=0.5, noise=False, by="cell")], ids=["open", "gates"]
)
@pytest.mark.parametrize("mode", ["fake", pytest.param("symbolic", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("make", NETWORKS.values(), ids=[*NETWORKS])
def test_every_kind_of_operation_in_exact_mode(make, mode, gate):
    recorded(make, True, mode, gate)


@pytest.mark.parametrize("make", NETWORKS.values(), ids=[*NETWORKS])
@pytest.mark.slow
def test_every_kind_of_operation_in_channels_last(make):
    for exact in (False, True):
        recorded(make, exact, "fake", GateConfig(target=0.5, noise=False, by="cell"), LAST)


@pytest.mark.parametrize("mode", ["real", "fake"])
def test_a_program_leaves_the_unit_of_the_loss_without_a_graph(mode):
    """Its weights require gradients, and the model's own step follows."""
    model, program, x = recorded(
        network, True, mode, GateConfig(target=0.5, noise=False, by="cell")
    )
    model.gate_loss_scale = None
    trained = [p for p in model.parameters() if p.requires_grad]

    def step(x):
        return torch.autograd.grad(model(x).square().sum(), trained)

    program = make_fx(step, tracing_mode=mode, _allow_non_fake_inputs=True)(x)
    for _ in range(2):
        got = program(x)
        unit = model.calls.resting.unit.value
        assert unit > 0
        assert not unit.requires_grad
        for g, w in zip(got, step(x), strict=True):
            torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)


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
