"""What an adapter keeps of its host's input serves whatever else would keep the same."""

import copy

import pytest
import torch
import torchvision
from helpers.comparing import (
    add,
    assert_gradients_close,
    assert_identical,
    assert_relatively_close,
    gradients,
    mix_gates_,
    score,
)
from torch import nn

from lightning_da3 import AdapterConfig, DA3Config, GateConfig, MemoryConfig, convert
from lightning_da3.memory import SavedActivations, StepPredictor, saved_activation_bytes
from lightning_da3.nn import adapter as nn_adapter
from lightning_da3.nn.adapter import HostInput
from lightning_da3.nn.call import Call
from lightning_da3.ops.recomputed import recomputed
from lightning_da3.ops.tokens import TokenGrid, read_tokens
from lightning_da3.reference import PlainPyTorch


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def converted(network, x, cells=49, **memory):
    """With a domain that has learned something, and gates partly closed."""
    adapter = AdapterConfig(hidden_channels=4, max_cells=cells, min_stride=1, min_depth=0)
    config = DA3Config(adapter, GateConfig(target=0.5, by="cell"), MemoryConfig(**memory))
    model = add(convert(network.eval(), config), "a")
    model.set_domain("a")
    mix_gates_(model, (x,))
    return model.train()


def saved(model, x):
    with SavedActivations(model, inputs=(x,)) as found:
        output = model(x)
    del output  # the graph lived until here
    return found


def vit(width=256):
    return torchvision.models.VisionTransformer(32, 8, 2, 2, width, 64, num_classes=3)


# --- tokens


def test_tokens_that_are_cells_are_coded_once(monkeypatch):
    network, x = vit(), torch.randn(2, 3, 32, 32)
    model = converted(network, x)
    once, got = saved(model, x), gradients(model, (x,))
    assert StepPredictor(model)(x).saved_activation_bytes == pytest.approx(once.bytes, rel=1e-3)
    monkeypatch.setattr(nn_adapter, "_codes_of", lambda *_: None)
    twice, want = saved(model, x), gradients(model, (x,))
    assert_identical(got, want)  # the very same codes
    branches = 2 * 2 - 1  # what is upstream of the first does not train
    assert twice.bytes - once.bytes == branches * 2 * 17 * (256 + 4 * 8)


@pytest.mark.parametrize(("width", "cells", "regions"), [(256, 4, 4), (40, 49, 1)])
@pytest.mark.slow
def test_cells_of_several_tokens_are_coded_apart_and_narrow_tokens_once(width, cells, regions):
    network, x = vit(width), torch.randn(2, 3, 32, 32)
    names = saved(converted(network, x, cells), x).by_module
    assert sum("recomputed" in name for name in names) == regions  # the last norm among them


@pytest.mark.parametrize("shape", [(2, 17, 256), (2, 3, 4, 256)], ids=str)
def test_the_codes_that_a_host_input_hands_on_are_those_of_a_segment(shape):
    door = HostInput("host", 49, None, prefix_tokens=1)
    adapter = nn_adapter.Adapter(256, 256, 4, 1, 1, gated=True, exact=False)
    door.calls.everywhere = Call({"host": adapter})
    x = torch.randn(shape, requires_grad=True)
    through, _, codes = door(x)
    assert codes is not None

    def gradient(**codes):
        (y,) = recomputed(lambda t: (t.exp(),), through, **codes)
        return torch.autograd.grad(y.sum(), x, retain_graph=True)[0]

    assert_identical(gradient(codes=codes), gradient())
    assert not torch.equal(gradient(codes=codes.flip(0)), gradient())
    with torch.no_grad():
        assert door(x)[2] is None  # nothing reads them


@pytest.mark.parametrize(("size", "own"), [((17,), 1), ((3, 4), 0)])
def test_single_tokens_are_not_copied(size, own):
    place = TokenGrid.of(size, own, 16)
    x = torch.randn(2, *size, 8, requires_grad=True)
    through, p = read_tokens(x, place)
    assert p.data_ptr() == x.data_ptr()
    assert_identical(p, x.flatten(1, -2).transpose(1, 2))
    assert read_tokens(x, place, apart=True)[1].data_ptr() != x.data_ptr()
    (grad,) = torch.autograd.grad(through.sum() + 2 * p.sum(), x)
    assert_identical(grad, torch.full_like(x, 3.0))


# --- maps


def narrow(stride=1, channels=32, **conv):
    """A map of 7x7 pixels, on which one convolution is a host."""
    return nn.Sequential(
        *(nn.Conv2d(3, channels, 3, 2, 1), nn.BatchNorm2d(channels), nn.ReLU()),
        *(nn.Conv2d(channels, channels, 3, stride, **conv), nn.BatchNorm2d(channels), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3)),
    )


def of_outputs(model, x):
    """Bytes that the last host's output keeps."""
    return saved(model, x).by_module["backbone.host_outputs.3"]


GATES, MEANS = 2 * 49 * 4, 2 * 49 * 32
ALONE = {
    "grouped": {"padding": 1, "groups": 4},
    "mirrored": {"padding": 1, "padding_mode": "reflect"},
    "dilated": {"padding": 2, "dilation": 2},
}


@pytest.mark.parametrize("exact", [False, True], ids=["coded", "exact"])
@pytest.mark.parametrize("name", ALONE)
def test_a_gate_keeps_no_means_that_follow_from_the_hosts_input(name, exact):
    network, x = narrow(**ALONE[name]), torch.randn(2, 3, 14, 14)
    model = converted(network, x, exact=exact)
    if not exact:  # else all of it is computed again
        assert of_outputs(model, x) == GATES
    predicted = StepPredictor(model)(x).saved_activation_bytes
    assert 0 <= predicted - saved(model, x).bytes < 64  # the loss
    plain = PlainPyTorch(network, model, folded=True)
    model.gate_loss_scale = 1.0  # as `plain.loss` is added
    loss = score(plain(x)) + plain.loss()
    want = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    got = gradients(model, (x,))
    assert_gradients_close(got, want, 1e-4 if exact else 0.03)


@pytest.mark.parametrize(
    ("size", "conv"),
    [
        (28, {"padding": 1, "groups": 4}),  # cells of several pixels
        (14, {"padding": 1, "groups": 4, "stride": 2}),
        (14, {"padding": 1, "channels": 128}),  # many multiply-accumulates for one output
    ],
    ids=["coarse", "strided", "dense"],
)
def test_other_means_are_kept(size, conv):
    x = torch.randn(2, 3, size, size)
    cells = 49 if conv.get("stride", 1) == 1 else 16
    kept = of_outputs(converted(narrow(**conv), x), x)
    assert kept >= 2 * cells * (4 + conv.get("channels", 32))


@pytest.mark.parametrize("weights", ["same", "bfloat16"])
def test_means_under_autocast(weights):
    network, x = narrow(**ALONE["grouped"]), torch.randn(2, 3, 14, 14)
    model = converted(network, x, weights=weights)

    def lowered():
        with torch.autocast("cpu", torch.bfloat16):
            output = model(x)
        return gradients(model, (x,), output)

    got = lowered()
    model.backbone.get_submodule("host_outputs.3").set_conv(None)
    want = lowered()
    assert_relatively_close(got, want, 0.02)
    assert any(not torch.equal(one, other) for one, other in zip(got, want, strict=True))


def test_a_copy_computes_its_own_convolution_again():
    x = torch.randn(2, 3, 14, 14)
    model = converted(narrow(**ALONE["grouped"]), x)
    want = gradients(model, (x,))
    copied = copy.deepcopy(model)
    with torch.no_grad():
        model.backbone.get_submodule("3").weight.zero_()
    assert_identical(gradients(copied, (x,)), want)
    assert not torch.equal(score(model(x)), score(copied(x)))


# --- compiled


@pytest.mark.filterwarnings("ignore")  # of the compiler about itself
@pytest.mark.slow
@pytest.mark.parametrize("size", [32, 14], ids=["tokens", "means"])
@pytest.mark.exhaustive
def test_compiled(size):
    torch._dynamo.reset()
    x = torch.randn(2, 3, size, size)
    model = converted(vit() if size == 32 else narrow(**ALONE["grouped"]), x)
    want, kept = gradients(model, (x,)), saved(model, x).bytes
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_relatively_close(gradients(compiled, (x,)), want, 1e-3)
    assert saved_activation_bytes(compiled, x) <= 1.01 * kept
