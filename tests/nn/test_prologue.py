"""The frozen start of a network takes a large batch in pieces: nobody can tell but by memory."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from lightning_da3 import AdapterConfig, DA3Config, convert
from lightning_da3.memory import StepPredictor, measure_step, saved_activation_bytes
from lightning_da3.nn import prologue as start
from lightning_da3.nn.prologue import Prologue

STEM = "backbone.stem.0"


class Net(nn.Module):
    """A residual start with two results, a constant and a concatenation; hosts behind stride 8."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.rand(1, 3, 1, 1))
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(inplace=True)
        )
        self.down = nn.Conv2d(16, 8, 3, 2, 1)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.SiLU())
        self.last = nn.Conv2d(16, 8, 3, 2, 1)
        self.hosts = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3))
        self.skip = nn.Conv2d(8, 8, 3)
        self.fc = nn.Linear(8, 2)

    def forward(self, x):
        x = self.down(self.stem((x - self.mean) / 2))
        x = self.last(torch.cat((x + self.block(x), F.max_pool2d(x, 3, 1, 1)), 1))
        return self.fc((self.hosts(x) + self.skip(x)).mean((2, 3)))


def domain_of(network, **adapter):
    torch.manual_seed(0)
    model = convert(network, DA3Config(adapter=AdapterConfig(**adapter)))
    model.add_domain("d", num_classes=2)
    model.set_domain("d")
    return model.train()


class Noted:
    """What a prediction would be told."""

    def __init__(self):
        self.cuts = []

    def met(self, samples, count):
        self.cuts.append((samples, count))

    def aside(self):
        return contextlib.nullcontext()


def record_masks(model):
    noted = Noted()
    for module in starts(model):
        module.account = noted
    return noted.cuts


def starts(model):
    return [module for module in model.modules() if isinstance(module, Prologue)]


@pytest.fixture
def few(monkeypatch):
    """Two samples of 64 x 64 pixels at once."""
    monkeypatch.setattr(start, "LARGEST_BYTES", 2 * 16 * 32 * 32 * 4)


@pytest.fixture
def model():
    torch.manual_seed(1)
    return domain_of(Net().eval())


def images(count, size=64):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(count))


def whole(monkeypatch, function):
    """What it gives where nothing is cut."""
    with monkeypatch.context() as patch:
        patch.setattr(start, "LARGEST_BYTES", 2**50)
        return function()


# --- what belongs to it


def test_a_start_ends_where_the_first_host_begins(model):
    plan = model.plan.parts[0].start
    assert plan.source == "x"
    assert {"sub", "stem_0", "stem_2", "down", "max_pool2d", "cat"} <= {*plan.nodes}
    assert not {"last", "hosts_0", "skip", "fc"} & {*plan.nodes}
    assert plan.growth == 16 * 32 * 32 / (3 * 64 * 64)
    assert "sub to cat: a large batch in pieces" in str(model.plan)
    assert len(starts(model)) == 1


class Around(nn.Module):
    """An operation between two convolutions in front of the first host."""

    def __init__(self, operation, channels=16):
        super().__init__()
        self.first, self.operation = nn.Conv2d(3, 16, 3, 1, 1), operation
        self.second, self.third = nn.Conv2d(channels, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 4, 1)
        self.fc = nn.Linear(16, 2)

    def forward(self, x):
        x = self.second(self.operation(torch.relu(self.first(x))))
        return self.fc(self.third(x).mean((2, 3)))


class Own(nn.Module):
    def forward(self, x):
        return x * 2


def hooked():
    layer = nn.SiLU()
    layer.register_forward_hook(lambda *_: None)
    return layer


MIXES = {
    "a mean of the batch": lambda x: x - x.mean(0, keepdim=True),
    "a softmax over it": lambda x: F.softmax(x, 0),
    "its end in front": lambda x: torch.cat((x[1:], x[:1])),
    "joined along it": lambda x: torch.cat((x, x)),
    "turned": lambda x: x.permute(1, 0, 2, 3).permute(1, 0, 2, 3),
    "a user's hook": hooked(),
    "its size": lambda x: x / len(x),
}
ALONE = {
    "a pool": nn.AvgPool2d(3, 1, 1),
    "a norm": nn.GroupNorm(4, 16),
    "a norm of channels": lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (16,)).permute(0, 3, 1, 2),
    "joined channels": lambda x: torch.cat((x, x.sigmoid()), -3),
    "a product": lambda x: x * torch.sigmoid(x),
    "its own layer": Own(),
}


@pytest.mark.parametrize("name", MIXES)
def test_what_looks_at_more_than_one_sample_ends_it(name, few):
    network = Around(MIXES[name]).eval()
    model = convert(network)
    (plan,) = (part.start for part in model.plan.parts)
    assert "first" in plan.nodes
    assert "second" not in plan.nodes
    torch.testing.assert_close(model(images(4)), network(images(4)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ALONE)
def test_what_looks_at_every_sample_alone_belongs_to_it(name, few):
    network = Around(ALONE[name], 32 if name == "joined channels" else 16).eval()
    model = convert(network)
    (plan,) = (part.start for part in model.plan.parts)
    assert "second" in plan.nodes
    torch.testing.assert_close(model(images(5)), network(images(5)), rtol=1e-4, atol=1e-5)


def overwritten(x):
    seen = x.mean((2, 3), keepdim=True).softmax(1)
    return F.silu(x * 1, inplace=True) * 2 + seen


def scaled(x):
    x = x * 2
    seen = x.mean(0, keepdim=True)
    x.mul_(3.0)
    return x * 2 + seen


def written_elsewhere(x):
    turned = x.permute(0, 2, 3, 1)
    x.add_(x.mean(0, keepdim=True))
    return turned.permute(0, 3, 1, 2) + 1


def rectified(x):
    x = x * 2
    seen = x.mean(0, keepdim=True)
    y = F.relu(x, inplace=True)
    return y * 2 + seen


@pytest.mark.parametrize("operation", [overwritten, scaled, written_elsewhere, rectified])
@pytest.mark.parametrize("largest", [1, 2**50])
def test_nothing_is_written_before_others_have_read_it(operation, largest, monkeypatch):
    monkeypatch.setattr(start, "LARGEST_BYTES", largest)
    network = Around(operation).eval()
    model = convert(network)
    assert starts(model)
    torch.testing.assert_close(model(images(5)), network(images(5)), rtol=1e-5, atol=1e-6)


def test_a_single_layer_may_be_all(few):
    model = convert(Around(lambda x: x - x.mean(0)).eval())
    assert model.plan.parts[0].start.nodes == ("first", "relu")
    cuts = record_masks(model)
    model(images(5))
    assert cuts == [(1, 5)]


def test_without_large_maps_there_is_none():
    network = nn.Sequential(
        nn.Conv2d(3, 2, 3, 2), nn.ReLU(), nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3)
    )
    assert convert(network, DA3Config(head=None)).plan.parts[0].start is None


# --- it computes the same


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_pieces_give_what_the_whole_batch_gives(model, few, monkeypatch, count, layout):
    model = model.to(memory_format=layout)
    x = images(count).contiguous(memory_format=layout)

    def step():
        model.zero_grad()
        y = model(x)
        y.square().sum().backward()
        return [y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    want = whole(monkeypatch, step)
    cuts = record_masks(model)
    got = step()
    assert cuts == ([(2, count)] if count > 1 else [])
    assert len(got) == len(want) > 8
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_results_lie_in_memory_as_they_do_whole(model, few, monkeypatch):
    (first,) = starts(model)
    x = images(5).contiguous(memory_format=torch.channels_last)
    mean = model.backbone.mean
    with torch.no_grad():
        want, got = whole(monkeypatch, lambda: first(x, mean)), first(x, mean)
    assert [(y.shape, y.stride()) for y in got] == [(y.shape, y.stride()) for y in want]


def test_constants_follow_the_model(model, few):
    other = copy.deepcopy(model).double()
    other.backbone.mean.add_(1.0)
    x = images(5).double()
    expected = copy.deepcopy(model).double()(x - 1.0)
    torch.testing.assert_close(other(x), expected)
    assert starts(other)[0].piece is not starts(model)[0].piece


def calls(model):
    """Samples of every call of the first convolution, as they come."""
    seen = []
    stem = model.get_submodule(STEM)
    stem.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    return seen


def test_what_builds_a_graph_goes_whole(model, few):
    seen = calls(model)
    x = images(5).requires_grad_()
    model(x).sum().backward()
    assert seen == [5]
    assert x.grad.abs().sum() > 0
    with torch.no_grad():
        model(x)
    assert seen == [5, 2, 2, 1]
    model.get_submodule(STEM).weight.requires_grad_(True)
    model(images(5)).sum().backward()
    assert seen[4:] == [5]
    assert model.get_submodule(STEM).weight.grad.abs().sum() > 0


def test_pixels_in_bytes_are_as_large_as_what_becomes_of_them(few):
    model = convert(Net().eval())
    cuts = record_masks(model)
    model((images(5) * 100).to(torch.uint8))
    assert cuts == [(2, 5)]


def test_a_fake_batch_outside_of_predictions_goes_whole(model, few):
    x = images(5)
    with torch.no_grad():
        traced = make_fx(model.eval(), tracing_mode="fake", _allow_non_fake_inputs=True)(x)
        torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_compiler_gets_the_whole_batch(model, few, monkeypatch):
    x = images(5)

    def convolutions():
        torch.compiler.reset()
        nodes = []

        def backend(gm, _):
            nodes.extend(gm.graph.nodes)
            return gm

        with torch.no_grad():
            y = torch.compile(model.eval(), backend=backend)(x)
            torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-5)
        return sum("conv" in str(node.target) for node in nodes)

    assert convolutions() == whole(monkeypatch, convolutions) > 5


# --- memory


def test_the_start_of_a_large_batch_needs_no_more_than_that_of_a_small_one(model, monkeypatch):
    largest = 16 * 32 * 32 * 4  # bytes of one sample
    monkeypatch.setattr(start, "LARGEST_BYTES", 4 * largest)

    def peak(count):
        x = images(count)

        def forward():
            with torch.no_grad():
                model(x)

        return measure_step(forward, repeats=0).peak_bytes

    uncut = whole(monkeypatch, lambda: peak(32))
    assert uncut > 2 * 32 * largest
    assert peak(32) < peak(4) + 32 * largest / 2  # with the results of all
    assert peak(32) < uncut / 2


@pytest.mark.parametrize("count", [2, 4, 6, 9])
def test_what_is_predicted_is_what_is_measured(few, count):
    model = domain_of(Net().eval()).to(memory_format=torch.channels_last)
    x = images(count).contiguous(memory_format=torch.channels_last)

    def step():
        F.cross_entropy(model(x), torch.zeros(count, dtype=torch.long)).backward()
        model.zero_grad()

    predicted = StepPredictor(model)(x)
    assert predicted.peak_bytes == pytest.approx(measure_step(step, repeats=0).peak_bytes, rel=0.1)
    kept = saved_activation_bytes(model, x)
    assert predicted.saved_activation_bytes == pytest.approx(kept, rel=0.02)  # and of the loss


def test_every_batch_size_follows_from_a_few(few):
    predictor = StepPredictor(domain_of(Net().eval()))
    sizes = predictor.by_batch(torch.empty(1, 3, 64, 64))
    for count in (1, 2, 3, 4, 5, 6, 16, 33):
        real, line = predictor(torch.empty(count, 3, 64, 64)), sizes.at(count)
        assert line.peak_bytes == real.peak_bytes
        assert line.flops_forward == real.flops_forward
        assert line.saved_activation_bytes == real.saved_activation_bytes
    flops = [predictor(torch.empty(count, 3, 64, 64)).flops_forward for count in (1, 9)]
    assert flops[1] == 9 * flops[0]


class Siamese(nn.Module):
    """Two sizes of images through one island."""

    def __init__(self):
        super().__init__()
        self.body, self.fc = Net(), nn.Linear(2, 2)

    def forward(self, x):
        if float(x.shape[0]) > 1e6:
            return x
        half = self.body(x[:, :, ::2, ::2])
        return self.fc(self.body(torch.cat((x, x))).view(2, len(x), 2).sum(0) + half)


def test_every_batch_size_follows_where_one_start_runs_several_times(few):
    model = convert(Siamese().eval(), DA3Config(head=None))
    model.add_domain("d")
    model.set_domain("d")
    assert len(starts(model)) == 1
    predictor = StepPredictor(model)
    sizes = predictor.by_batch(torch.empty(1, 3, 64, 64))
    for count in (1, 2, 3, 5, 7, 8, 9, 13, 17, 32):
        real, line = predictor(torch.empty(count, 3, 64, 64)), sizes.at(count)
        assert line.peak_bytes == real.peak_bytes
        assert line.flops_forward == real.flops_forward
