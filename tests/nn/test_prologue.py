"""The prologue takes a large batch in microbatches."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.prologues import STEM, Net, domain_of, images, record_masks, starts
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from lightning_da3 import DA3Config, convert
from lightning_da3.memory import StepPredictor, measure_step, saved_activation_bytes
from lightning_da3.nn import prologue
from lightning_da3.ops.exportable import exportable


@pytest.fixture
def few(monkeypatch):
    """Two samples of 64 x 64 pixels at once."""
    monkeypatch.setattr(prologue, "LARGEST_BYTES", 2 * 16 * 32 * 32 * 4)


@pytest.fixture
def model():
    torch.manual_seed(1)
    return domain_of(Net().eval(), hidden_channels=16, max_cells=49)  # less memory than the start


def whole(monkeypatch, function):
    """What it gives where nothing is cut."""
    with monkeypatch.context() as patch:
        patch.setattr(prologue, "LARGEST_BYTES", 2**50)
        return function()


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


def test_a_file_for_batches_of_one_size_has_pieces(model, few, monkeypatch):
    x = images(5)

    def recorded_calls(symbols):
        seen = calls(model)
        with torch.no_grad(), exportable():
            mode = "symbolic" if symbols else "fake"
            traced = make_fx(model.eval(), tracing_mode=mode, _allow_non_fake_inputs=True)(x)
        torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-5)
        return seen

    assert recorded_calls(False)[:3] == [1, 1, 1]  # smaller than in eager mode
    monkeypatch.setattr(prologue, "MOST_PIECES", 3)
    assert recorded_calls(False)[:3] == [2, 2, 1]
    monkeypatch.setattr(prologue, "MOST_PIECES", 1)
    assert recorded_calls(False)[:3] == [2, 2, 1]  # no larger than in eager mode
    assert len(recorded_calls(True)[:-3]) == 1  # all at once; then the model itself


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_start_of_a_large_batch_needs_no_more_than_that_of_a_small_one(model, monkeypatch):
    largest = 16 * 32 * 32 * 4  # bytes of one sample
    monkeypatch.setattr(prologue, "LARGEST_BYTES", 4 * largest)

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


@pytest.mark.slow
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


@pytest.mark.exhaustive
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
