"""What is kept for the backward pass, and the gradients that come of it."""

import pytest
import torch
from helpers import models
from helpers.comparing import (
    assert_identical,
    assert_relatively_close,
    gradients,
    score,
)
from helpers.converted import choose, converted, network

from lightning_da3 import (
    DA3Config,
    GateConfig,
    MemoryConfig,
    convert,
)
from lightning_da3.memory import SavedActivations, saved_activation_bytes
from lightning_da3.reference import PlainPyTorch

EXACT = MemoryConfig(exact=True)


SLOW_FAMILIES = ("inception_v3", "googlenet", "vgg11_bn")


GRADIENT_FAMILIES = ["resnet18", "resnext", "mobilenet_v2", "shufflenet_v2_x0_5", "squeezenet1_1"]


GRADIENT_FAMILIES += [
    *(pytest.param(n, marks=pytest.mark.slow) for n in ("regnet_x_400mf", "mnasnet0_5", "alexnet")),
    *(pytest.param(n, marks=pytest.mark.exhaustive) for n in ("densenet", *SLOW_FAMILIES)),
]


CASES = [*models.ZOO, *GRADIENT_FAMILIES]


# PyTorch's own network of an even kernel warns; conversion pads itself
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(
    "gate", [None, GateConfig(target=0.3, weight=10.0, by="cell")], ids=["plain", "gated"]
)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.slow
def test_exact_gradients_are_those_of_plain_pytorch(name, gate):
    model = converted(name, torch.float64, gate=gate, memory=EXACT)
    plain = PlainPyTorch(network(name).double(), model)
    model.gate_loss_scale = 1.0  # as `plain.loss` is added
    trained = [p for p in model.parameters() if p.requires_grad]
    x, y = models.inputs(name, torch.float64), models.inputs(name, torch.float64)
    for tensor in (*x, *y):
        tensor.requires_grad_()

    outputs, expected = model(*x), plain(*y)
    assert_relatively_close(outputs, expected, 1e-9)
    if gate is not None:
        assert 0.0 < model.executed_flops_fraction < 1.0  # else the gates test nothing
    got = torch.autograd.grad(score(outputs), [*trained, *x])
    want = torch.autograd.grad(score(expected) + plain.loss(), [*trained, *y])
    # for one that is 0, as of a bias in front of a batch norm of the batch
    rounding = 1e-5 * max(other.norm() for other in want)
    for one, other in zip(got, want, strict=True):
        assert (one - other).norm() <= 1e-9 * max(other.norm(), rounding)


@pytest.mark.parametrize("name", ["Residual", "Depthwise", "NormFirst"])
def test_input_gradient_without_a_domain(name):
    net = network(name).double().eval()
    model = convert(net, choose())
    (x,), (y,) = models.inputs(name, torch.float64), models.inputs(name, torch.float64)
    score(model(x.requires_grad_())).backward()
    score(net(y.requires_grad_())).backward()
    assert_relatively_close(x.grad, y.grad, 1e-9)


def test_coded_gradients_are_close_to_exact_ones():
    exact = converted("Residual", torch.float64, memory=EXACT)
    coded = converted("Residual", torch.float64)
    x = models.inputs("Residual", torch.float64)
    assert_identical(coded(*x), exact(*x))  # codes are for the backward only
    pairs = list(zip(gradients(coded, x), gradients(exact, x), strict=True))
    assert any(not torch.equal(one, other) for one, other in pairs)
    largest = max(other.norm() for _, other in pairs)
    for one, other in pairs:
        assert (one - other).norm() <= 0.02 * max(other.norm(), 0.01 * largest)


@pytest.mark.parametrize("memory", [MemoryConfig(), EXACT], ids=["coded", "exact"])
def test_a_second_backward_through_a_retained_graph(memory):
    model, x = converted("Residual", memory=memory), models.inputs("Residual")
    outputs = model(*x)
    trained = [p for p in model.parameters() if p.requires_grad]
    first = torch.autograd.grad(score(outputs), trained, retain_graph=True)
    assert_identical(torch.autograd.grad(score(outputs), trained), first)
    assert_identical(gradients(model, x), first)


def test_a_batch_can_be_split_exactly():
    model = converted("Residual", torch.float64, gate=None)
    (x,) = models.inputs("Residual", torch.float64)
    model(x).sum().backward()
    whole = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    for part in x.split(1):
        model(part).sum().backward()
    parts = [p.grad for p in model.parameters() if p.requires_grad]
    assert_relatively_close(parts, whole, 1e-9)


def test_autocast():
    model, x = converted("Residual", gate=None), models.inputs("Residual")
    full = gradients(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(*x)
    for one, other in zip(gradients(model, x, outputs.float()), full, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() <= 0.1 * other.norm()


def test_saved_bytes_of_resnet18_are_far_below_fine_tuning():
    net = models.family("resnet18").train()
    x = torch.randn(4, 3, 64, 64)
    fine_tuning = saved_activation_bytes(net, x)
    model = convert(net)
    model.add_domain("a", 10)
    model.set_domain("a")
    ours = saved_activation_bytes(model.train(), x)
    assert 0 < ours <= fine_tuning / 50  # measured: 1/61; the adapters weigh most on small maps


@pytest.mark.parametrize("memory", [MemoryConfig(), EXACT], ids=["coded", "exact"])
def test_nothing_is_kept_upstream_of_the_first_host(memory):
    net = models.family("resnet18")
    model = convert(net, DA3Config(memory=memory))
    model.add_domain("a", 10)
    model.set_domain("a")
    x = torch.randn(2, 3, 64, 64)
    first = model.plan.hosts[0].name
    assert first == "layer3.0.conv1"  # the first to work on a map downsampled by 16
    with SavedActivations(model, inputs=x) as saved:
        y = model(x)
    assert y.requires_grad
    upstream = ("conv1", "relu", "maxpool", "layer1")
    names = [name.removeprefix("backbone.") for name in saved.by_module]
    assert not [name for name in names if name.replace("_", ".").startswith(upstream)]
    assert saved.bytes > 0


def test_kept_bytes_by_hand():
    """Two convolutions that write maps of 6 x 6, an adapter on 3 x 3 cells each; N = 2."""
    model = converted("ConvWithoutNorm", gate=None, memory=EXACT)
    x = models.inputs("ConvWithoutNorm")
    float_bytes, n = 4, 2
    cells = 3 * 3

    def adapter(channels, hidden=4):
        return n * float_bytes * cells * (channels + hidden)  # pooled input, hidden map

    bits = (n * 4 * 6 * 6) // 8 + (n * 6 * 6 * 6) // 8
    head = n * 6 * float_bytes
    assert saved_activation_bytes(model, *x) == adapter(3) + adapter(4) + bits + head


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("domain", ["a", None])
def test_nothing_is_kept_without_gradients(context, domain):
    model, x = converted("Residual"), models.inputs("Residual")
    model.set_domain(domain)
    expected = model(*x).detach()
    with context():
        assert saved_activation_bytes(model, *x) == 0
        y = model(*x)
        assert not y.requires_grad
    assert_identical(y.clone(), expected)


def test_nothing_is_kept_without_a_domain():
    model, x = converted("Residual"), models.inputs("Residual")
    model.set_domain(None)
    assert not model(*x).requires_grad
    assert saved_activation_bytes(model, *x) == 0
