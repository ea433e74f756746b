"""What stays Python keeps little, too: of which functions, how much, and how right."""

import pytest
import torch
import torch.nn.functional as F
from helpers import zoo
from helpers.comparing import add, assert_identical, mix_gates_, score

from lightning_da3 import AdapterConfig, DA3Config, MemoryConfig, convert
from lightning_da3.eager import SMALL, KeepsLess
from lightning_da3.memory import saved_activation_bytes

FLOAT = 4  # bytes
CODES = 1 + 8 / 64  # rows of 64


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X, Y = randn(2, 64, 64), randn(2, 64, 64, seed=1)
# a function of two activations; bytes an element that it keeps, exact and with codes
FUNCTIONS = {
    "relu": (lambda x, y: F.relu(x) + y, 1 / 8, 1 / 8),
    "a method": (lambda x, y: x.relu() + y, 1 / 8, 1 / 8),
    "leaky relu": (lambda x, y: F.leaky_relu(x, 0.1) + y, 1 / 8, 1 / 8),
    "average pool": (lambda x, y: F.avg_pool2d(x, 2) + y[:, ::2, ::2], 0, 0),
    "product": (lambda x, y: x * y, 2 * FLOAT, 2 * CODES),
    "matrix product": (lambda x, y: x @ y, 2 * FLOAT, 2 * CODES),
    "product by name": (lambda x, y: torch.bmm(x, y), 2 * FLOAT, 2 * CODES),
    "softmax": (lambda x, y: torch.softmax(x, 1) + y, FLOAT, CODES),
    "softmax by name": (lambda x, y: F.softmax(x, dim=-1) + y, FLOAT, CODES),
    "square": (lambda x, y: x * x + y, FLOAT, FLOAT),
    "scaled": (lambda x, y: x * 3.0 + y, 0, 0),
    "division": (lambda x, y: x / (y + 9.0), 2 * FLOAT, 2 * FLOAT),
    "sigmoid": (lambda x, y: torch.sigmoid(x) + y, FLOAT, FLOAT),
}


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "coded"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name, exact):
    fn, exact_bytes, coded_bytes = FUNCTIONS[name]
    x, y = X.clone().requires_grad_(), Y.clone().requires_grad_()
    want = torch.autograd.grad(score(fn(x, y)), [x, y])

    def ours():
        with KeepsLess(exact=exact):
            return fn(x * 1, y * 1)

    assert saved_activation_bytes(ours) == X.numel() * (exact_bytes if exact else coded_bytes)
    torch.testing.assert_close(ours(), fn(X, Y), rtol=0, atol=0)
    got = torch.autograd.grad(score(ours()), [x, y])
    for one, other in zip(got, want, strict=True):
        if exact or exact_bytes == coded_bytes:
            torch.testing.assert_close(one, other)
        else:
            assert (one - other).norm() <= 0.01 * other.norm()


def test_what_is_small_or_written_in_place_is_pytorch_s():
    def kept(size, fn):
        x = randn(size).requires_grad_()
        with KeepsLess(exact=False):
            return saved_activation_bytes(lambda: fn(x * 1))

    assert kept(SMALL, torch.relu) == SMALL / 8
    assert kept(SMALL - 1, torch.relu) == (SMALL - 1) * FLOAT
    assert kept(SMALL, torch.relu_) == SMALL * FLOAT


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "coded"])
def test_sampling_at_points(exact):
    x, points = randn(2, 8, 32, 32), randn(2, 48, 40, 2) * 0.7

    def kept_and_gradient(fn):
        leaf = x.clone().requires_grad_()
        y = fn(leaf * 1)
        return saved_activation_bytes(lambda: fn(leaf * 1)), *torch.autograd.grad(score(y), leaf)

    def ours(t):
        with KeepsLess(exact=exact):
            return F.grid_sample(t, points * 1.0, align_corners=False)

    kept, got = kept_and_gradient(ours)
    assert kept == points.numel() * FLOAT
    plain, want = kept_and_gradient(lambda t: F.grid_sample(t, points, align_corners=False))
    assert plain == (x.numel() + points.numel()) * FLOAT
    torch.testing.assert_close(got, want)


def converted(memory, size=12, dtype=torch.float32):
    adapter = AdapterConfig(hidden_channels=4, max_cells=16)
    net = zoo.network("RefinesStepwise").to(dtype)
    model = add(convert(net, DA3Config(adapter=adapter, head=None, memory=memory)), "a")
    model.set_domain("a")
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    mix_gates_(model, (x,))
    return model.train(), x


def test_an_island_is_computed_again_from_all_that_it_reads():
    model, _ = converted(MemoryConfig())
    (cell,) = [part for part in model.plan.parts if part.path == "cell"]
    assert not cell.hosts
    (region,) = cell.regions
    assert (region.source, region.also) == ("hidden", ("x",))
    assert "again from hidden, x (0)" in str(model.plan)


@pytest.mark.parametrize("memory", [MemoryConfig(), MemoryConfig(exact=True)])
def test_a_network_that_stays_python_keeps_little(memory, monkeypatch):
    model, x = converted(memory, size=64)
    trained = [p for p in model.parameters() if p.requires_grad]
    kept, got = saved_activation_bytes(model, x), torch.autograd.grad(score(model(x)), trained)
    monkeypatch.setattr("lightning_da3.eager.SMALL", 10**9)
    more, want = saved_activation_bytes(model, x), torch.autograd.grad(score(model(x)), trained)
    assert kept < (0.9 if memory.exact else 0.5) * more
    if memory.exact:
        torch.testing.assert_close(got, want)
    else:
        for one, other in zip(got, want, strict=True):
            assert torch.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.999


def test_nothing_is_left_behind():
    model, x = converted(MemoryConfig(), size=64)
    first = model(x)
    assert_identical(model(x), first)
    assert torch.relu(x.requires_grad_()).grad_fn.name() == "ReluBackward0"


# written into after it was read: PyTorch's gradient is right, and so must ours be
WRITTEN = {
    "what only sums read": lambda x: ((x * 2) ** 2 + x.zero_()).sum(),
    "what follows": lambda x: ((torch.sigmoid(x) + 1).mul_(3) ** 2).sum(),
    "what is kept": lambda x: (torch.sigmoid(x) * (x + 1) + (x + 1).exp() + x.zero_()).sum(),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_writes_are_seen(name):
    def gradient(exact):
        leaf = X.clone().requires_grad_()
        if exact is None:
            return torch.autograd.grad(WRITTEN[name](leaf * 1), leaf)
        with KeepsLess(exact=exact):
            y = WRITTEN[name](leaf * 1)
        return torch.autograd.grad(y, leaf)

    torch.testing.assert_close(gradient(True), gradient(None))
