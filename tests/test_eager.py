"""What stays Python keeps little, too: of which functions, how much, and how right."""

import contextlib
import weakref

import pytest
import torch
import torch.nn.functional as F
from helpers import zoo
from helpers.comparing import add, assert_identical, mix_gates_, score
from torch.utils.checkpoint import checkpoint

from lightning_da3 import AdapterConfig, DA3Config, GateConfig, MemoryConfig, convert
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
    config = DA3Config(adapter, GateConfig(target=0.5, by="cell"), memory, head=None)
    model = add(convert(net, config), "a")
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


# --- arithmetic on what is kept already -----------------------------------------------------------


def focal(x, targets):
    """The loss of detectors, as libraries write it."""
    p = torch.sigmoid(x)
    loss = F.binary_cross_entropy_with_logits(x, targets, reduction="none")
    p_t = p * targets + (1 - p) * (1 - targets)
    loss = loss * ((1 - p_t) ** 2)
    return ((0.25 * targets + 0.75 * (1 - targets)) * loss).sum()


def chain(x, y):
    for _ in range(40):
        x = (x * y).exp() * 0.1
    return x


# a function of an activation and another; which of them need gradients; elements that PyTorch keeps
# of each, and those that are kept
ARITHMETIC = {
    "focal loss": (focal, (True, False), 8, 3),
    "focal loss of two": (focal, (True, True), 10, 3),
    "powers": (lambda x, y: (x**2 * 3 + x) ** 3 + y, (True, True), 2, 1),
    "what is kept is a result": (lambda x, y: (1 - x.sigmoid()) ** 2 + y, (True, True), 2, 1),
    "quotients": (lambda x, y: x / (y + 9) + (x - 1) / (y * y + 9), (True, True), 5, 3),
    "constants divided": (lambda x, y: (x**2 / 3 + 1).log() + y, (True, True), 2, 1),
    "twice": (lambda x, y: (x**2 + 1) * (x**2 + 1) + y, (True, True), 3, 1),
    "unread": (lambda x, y: (y * y).log1p().sigmoid() + x.exp().tanh(), (True, True), 5, 2),
    "nothing is kept": (lambda x, y: (2 - x) * 3 + y, (True, True), 0, 0),
}


@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic_keeps_what_is_kept_already(name):
    fn, needed, plain, few = ARITHMETIC[name]
    x, y = X.clone().requires_grad_(needed[0]), Y.clone().abs().requires_grad_(needed[1])
    wanted = [t for t in (x, y) if t.requires_grad]

    def ours():
        with KeepsLess(exact=True):
            return fn(x * 1, y * 1)

    def theirs():
        return fn(x * 1, y * 1)

    assert saved_activation_bytes(theirs) == plain * FLOAT * X.numel()
    assert saved_activation_bytes(ours) == few * FLOAT * X.numel()
    want = torch.autograd.grad(score(theirs()), wanted)
    for one, other in zip(torch.autograd.grad(score(ours()), wanted), want, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_what_takes_many_steps_is_kept_on_the_way():
    x, y = X.clone().requires_grad_(), Y.clone().requires_grad_()
    want = torch.autograd.grad(score(chain(x, y)), [x, y])

    def ours():
        with KeepsLess(exact=True):
            return chain(x * 1, y * 1)

    kept = saved_activation_bytes(ours) / FLOAT / X.numel()
    assert 2 < kept < 0.2 * saved_activation_bytes(lambda: chain(x * 1, y * 1)) / FLOAT / X.numel()
    for one, other in zip(torch.autograd.grad(score(ours()), [x, y]), want, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def write_between(x, y):
    p = torch.sigmoid(x)
    rest = 1 - p
    rest.mul_(2)  # what it was computed from does not say so
    return (rest * (y + 1)) ** 2


def write_what_is_kept(x, y):
    base = x * 1
    one = base**2 + 1
    base.add_(1)  # PyTorch refuses the gradient of the square, and only that
    return (one.detach() * y).sum() + (base * y).sum()


def write_what_a_recipe_begins_with(x, y):
    base = x.detach() * 1
    one = base * y + 1  # keeps base
    other = 1 - base
    base.zero_()
    return one.detach() * 2 + other * y


def write_as_data(x, y):
    p = torch.sigmoid(x)
    rest = 1 - p
    rest.data.mul_(2)
    other = 1 - y.sigmoid()
    other.data = other.data * 3
    return rest**2 + other**2


@pytest.mark.parametrize(
    "fn", [write_as_data, write_between, write_what_is_kept, write_what_a_recipe_begins_with]
)
def test_arithmetic_sees_writes(fn):
    x, y = X.clone().requires_grad_(), Y.clone().requires_grad_()
    want = torch.autograd.grad(score(fn(x * 1, y * 1)), [x, y], allow_unused=True)
    with KeepsLess(exact=True):
        z = fn(x * 1, y * 1)
    got = torch.autograd.grad(score(z), [x, y], allow_unused=True)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_what_is_written_into_later_is_refused_as_by_pytorch():
    x = X.clone().requires_grad_()
    with KeepsLess(exact=True):
        p = torch.sigmoid(x * 1)
        y = ((1 - p) ** 2).sum()
    with torch.no_grad():
        p.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_arithmetic_in_autocast_is_pytorch_s():
    x = X.clone().requires_grad_()

    def kept(ours):
        mode = KeepsLess(exact=True) if ours else contextlib.nullcontext()
        with mode, torch.autocast("cpu", torch.bfloat16):
            return (1 - (x @ x.mT).sigmoid()) ** 2

    assert saved_activation_bytes(lambda: kept(True)) == saved_activation_bytes(lambda: kept(False))


def test_nothing_lives_longer_for_arithmetic():
    x = X.clone().requires_grad_()
    mode = KeepsLess(exact=True)
    with mode:
        p = torch.sigmoid(x * 1)
        y = (1 - p) ** 2
    refs = [weakref.ref(p), weakref.ref(y)]
    del p, y
    assert not any(ref() is not None for ref in refs)
    assert mode is not None


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "coded"])
@pytest.mark.parametrize("name", ["relu", "product", "what is kept is a result"])
def test_checkpoints_compute_again_what_they_computed(name, exact):
    fn = {**FUNCTIONS, **ARITHMETIC}[name][0]
    x, y = X.clone().requires_grad_(), Y.clone().requires_grad_()
    want = torch.autograd.grad(score(fn(x * 1, y * 1)), [x, y])
    with KeepsLess(exact=exact):
        z = checkpoint(fn, x * 1, y * 1, use_reentrant=False)
    for one, other in zip(torch.autograd.grad(score(z), [x, y]), want, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
