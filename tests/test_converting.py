"""Conversion: what it computes, what it leaves alone, what it refuses."""

import copy
import io
import pickle

import pytest
import torch
from helpers import models, small
from helpers.comparing import (
    add,
    assert_identical,
    assert_relatively_close,
    gradients,
    photograph,
    score,
)
from helpers.converted import choose, converted, network, refused
from helpers.marks import others_slow
from torch import nn

from lightning_da3 import (
    ConfigError,
    ConversionError,
    InputError,
    convert,
)

WITH_MODES = (nn.Dropout, nn.BatchNorm2d)


FAMILY_NAMES = others_slow(models.FAMILIES, "resnet18", "mobilenet_v2", "alexnet")


# PyTorch's own network of an even kernel warns; conversion pads itself
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("name", [*models.ZOO, *FAMILY_NAMES])
def test_conversion_reproduces_the_backbone_and_leaves_it_alone(name):
    net = network(name)
    before = photograph(net)
    model = convert(net, choose(name, head=None))
    assert photograph(net) == before
    x = models.inputs(name)
    with torch.no_grad():
        got, expected = model(*x), net.eval()(*x)
        assert_relatively_close(got, expected, 1e-4)
        model.add_domain("fresh")
        model.set_domain("fresh")
        assert_identical(model(*x), got)  # a fresh domain adds exactly zero
        if name in models.ZOO:
            model, x = convert(net.double(), choose(name)), models.inputs(name, torch.float64)
            assert_relatively_close(model(*x), net(*x), 1e-9)


@pytest.mark.parametrize("name", ["Residual", "DictOutput", "NormFirst"])
def test_other_domains_and_none_stay_the_same_bit_for_bit(name):
    model, x = converted(name), models.inputs(name)
    add(model, "b", seed=2)

    def outputs(domain):
        model.set_domain(domain)
        with torch.no_grad():
            return model(*x)

    before = {domain: outputs(domain) for domain in (None, "a", "b")}
    model.set_domain("a")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        score(model(*x)).backward()
        optimizer.step()
    for domain in (None, "b"):
        assert_identical(outputs(domain), before[domain])
    with pytest.raises(AssertionError):
        assert_identical(outputs("a"), before["a"])


def test_batch_norm_statistics_never_move_and_dropout_is_off():
    model, x = converted("ConvNorm", gate=None), models.inputs("ConvNorm")
    assert model.training
    backbone = copy.deepcopy(model.backbone.state_dict())
    first = model(*x)
    assert_identical(model(*x), first)
    model(x[0] * 100 + 3)
    assert_identical(dict(model.backbone.state_dict()), dict(backbone))
    assert not any(
        module.training for module in model.backbone.modules() if type(module) in WITH_MODES
    )
    assert all(module.training for module in model.domain("a").modules())
    assert_identical(model.eval()(*x), first)
    assert not model.domain("a").training


@pytest.mark.parametrize("training", [True, False])
def test_the_training_flag_is_taken_over(training):
    net = network("ConvNorm").train(training)
    model = convert(net, choose())
    assert model.training is net.training is training


def test_a_dropout_that_the_user_wants_in_eval_stays():
    net = models.randomise_(small.AlwaysDropout())
    model = convert(net, choose()).eval()
    (x,) = models.inputs("AlwaysDropout")
    assert not torch.equal(model(x), model(x))
    mean = torch.stack([model(x) for _ in range(300)]).mean(0)
    expected = net.eval().fc(net.conv(x).mean((2, 3)))
    torch.testing.assert_close(mean, expected, rtol=0, atol=0.02)


def test_the_call_signature_is_kept():
    net = network("Keywords").eval()
    model = convert(net, choose())
    (x,) = models.inputs("Keywords")
    for args, kwargs in (((x,), {}), ((x, 3.0), {}), ((), {"x": x, "scale": 0.5})):
        assert_relatively_close(model(*args, **kwargs), net(*args, **kwargs), 1e-5)


def test_the_output_structure_is_kept():
    model = converted("TwoInputsTwoOutputs")
    x = models.inputs("TwoInputsTwoOutputs")
    logits, maps = model(*x)
    assert isinstance(maps, list)
    assert logits.shape == (2, models.CLASSES)
    assert set(converted("DictOutput")(x[0])) == {"logits", "map"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_type_is_that_of_the_network(dtype):
    model = converted("Residual", dtype)
    y = model(*models.inputs("Residual", dtype))
    assert y.dtype == dtype
    y.float().sum().backward()
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {dtype}


def test_channels_last_stays_channels_last():
    model, (x,) = converted("Residual"), models.inputs("Residual")
    contiguous = model(x)
    last = x.contiguous(memory_format=torch.channels_last)
    assert_relatively_close(model(last), contiguous, 1e-5)
    assert_relatively_close(gradients(model, [last]), gradients(model, [x]), 1e-4)
    maps = []
    model.backbone.conv2.register_forward_hook(lambda module, args, y: maps.append(y))
    model(last)
    assert maps[0].is_contiguous(memory_format=torch.channels_last)


def _save_and_load(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), _save_and_load],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_a_copy_is_the_same_and_its_own(duplicate):
    model, x = converted("Residual"), models.inputs("Residual")
    twin = duplicate(model)
    expected = model(*x).detach()
    assert twin.active_domain == "a"
    assert twin.plan == model.plan
    assert twin.training
    assert_identical(twin(*x).detach(), expected)
    assert_identical(gradients(twin, x), gradients(model, x))
    with torch.no_grad():
        for parameter in twin.domain("a").parameters():
            parameter.add_(1.0)
    assert_identical(model(*x).detach(), expected)
    assert not torch.equal(twin(*x), expected)
    twin.add_domain("b", 7)
    twin.set_domain("b")
    assert twin(*x).shape == (2, 7)
    assert model.domains == ["a"]


def test_a_second_conversion_is_refused():
    model = converted("Residual")
    refused(model, "DA3Model is converted already", "call `add_domain`")
    refused(nn.Sequential(model, nn.ReLU()), "Sequential is converted already")


def test_wrong_arguments_are_refused():
    with pytest.raises(ConfigError, match=r"`backbone` must be a torch.nn.Module, got str"):
        convert("resnet18")
    with pytest.raises(ConfigError, match="`config` must be a DA3Config"):
        convert(network("ConvNorm"), 0)


class Counts(models.ConvNorm):
    """Python state that one graph cannot hold."""

    calls = 0

    def forward(self, x):
        type(self).calls += 1
        return super().forward(x) + self.calls


def test_example_inputs_find_a_network_that_is_no_graph():
    net = network("Residual").train()
    (x,) = models.inputs("Residual")
    before = photograph(net)
    convert(net, choose(), example_inputs=x)
    convert(net, choose(), example_inputs=(x,))
    assert photograph(net) == before
    with pytest.raises(ConversionError, match="does not reproduce the backbone"):
        convert(Counts(), choose(), example_inputs=x)
    with pytest.raises(ConversionError, match="example inputs do not fit"):
        convert(network("NormFirst"), choose(), example_inputs=x[:, :2])


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((2, 4, 12, 12), torch.float32, r"\(N, 3, H, W\), got \(2, 4, 12, 12\)"),
        ((2, 3, 12), torch.float32, r"\(N, 3, H, W\), got \(2, 3, 12\)"),
        ((2, 3, 12, 12), torch.uint8, r"floating-point batches .* got torch.uint8"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(shape, dtype, message):
    with pytest.raises(InputError, match=message):
        converted("ConvNorm")(torch.zeros(shape, dtype=dtype))


def test_an_empty_batch():
    model = converted("Residual", gate=None)
    y = model(torch.empty(0, 3, 12, 12))
    assert y.shape == (0, 3)
    y.sum().backward()
    assert all((p.grad == 0).all() for p in model.parameters() if p.requires_grad)
