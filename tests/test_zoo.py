"""Networks as users write them: each converts, computes the same and has the right gradients."""

import pytest
import torch
from helpers import zoo
from helpers.comparing import (
    add,
    assert_gradients_close,
    assert_relatively_close,
    leaves,
    mix_gates_,
    photograph,
    score,
)
from helpers.marks import others_slow

from lightning_da3 import (
    AdapterConfig,
    DA3Config,
    GateConfig,
    MemoryConfig,
    convert,
)
from lightning_da3.memory import saved_activation_bytes
from lightning_da3.reference import PlainPyTorch

EXACT = MemoryConfig(exact=True)
ADAPTER = AdapterConfig(hidden_channels=4, max_cells=16, min_stride=1)


CONFIG = DA3Config(adapter=ADAPTER, gate=GateConfig(target=0.5, by="cell"), head=None)


GATES = [None, GateConfig(target=0.3, weight=10.0, by="cell")]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def converted(name, dtype=torch.float32, **choices):
    config = DA3Config(
        **{"adapter": ADAPTER, "gate": GateConfig(target=0.5, by="cell"), "head": None, **choices}
    )
    model = add(convert(zoo.network(name).to(dtype), config), "a")
    model.set_domain("a")
    mix_gates_(model, zoo.batch(name, dtype))
    return model.train()


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


HEAVY = ("Windows", "VisionTransformer", "RefinesStepwise", "Recurrent", "MlpMixer")
HEAVY += ("NormsThatAssert", "CrossAttention", "LayerScale", "FunctionsWithOwnWeights")
HEAVY += ("StandardisedWeights", "RecurrentAlone")
FEW = others_slow(zoo.ZOO, *(name for name in zoo.ZOO if name not in HEAVY))


@pytest.mark.parametrize("name", zoo.ZOO)
def test_conversion_reproduces_the_backbone_and_leaves_it_alone(name):
    net = zoo.network(name)
    before = photograph(net)
    model = convert(net, CONFIG)
    assert photograph(net) == before
    with torch.no_grad():
        got, expected = model(*zoo.batch(name)), net.eval()(*zoo.batch(name))
    assert type(got) is type(expected)
    assert_relatively_close(got, expected, 1e-4)


@pytest.mark.parametrize(
    "gate",
    [pytest.param(GATES[0], marks=pytest.mark.exhaustive), GATES[1]],
    ids=["plain", "gated"],
)
@pytest.mark.parametrize("name", FEW)
def test_gradients_are_those_of_plain_pytorch(name, gate):
    model = converted(name, torch.float64, gate=gate, memory=EXACT)
    plain = PlainPyTorch(zoo.network(name).double(), model)
    model.gate_loss_scale = 1.0  # as `plain.loss` is added
    x, y = zoo.batch(name, torch.float64), zoo.batch(name, torch.float64)
    for tensor in (*leaves(x), *leaves(y)):
        tensor.requires_grad_()
    outputs, expected = model(*x), plain(*y)
    assert_relatively_close(outputs, expected, 1e-9)
    if gate is not None:
        assert 0.0 < model.executed_flops_fraction < 1.0  # else the gates test nothing
    got = torch.autograd.grad(score(outputs), [*trained(model), *leaves(x)])
    want = torch.autograd.grad(score(expected) + plain.loss(), [*trained(model), *leaves(y)])
    largest = max(other.norm() for other in want)
    for one, other in zip(got, want, strict=True):
        assert (one - other).norm() <= 1e-9 * max(other.norm(), 1e-6 * largest)

    coded = converted(name, torch.float64, gate=gate)
    coded.gate_loss_scale = 1.0
    outputs = coded(*zoo.batch(name, torch.float64))
    assert_relatively_close(outputs, expected, 1e-9)
    for one, other in zip(torch.autograd.grad(score(outputs), trained(coded)), want, strict=False):
        if other.norm() > 1e-3 * largest:  # else the direction is of rounding
            assert torch.cosine_similarity(one.flatten(), other.flatten(), dim=0) >= 0.9975


def test_a_buffer_that_changes_in_forward_changes():
    model = converted("CountsCalls")
    before = model.backbone.calls.clone()
    model(*zoo.batch("CountsCalls"))
    assert model.backbone.calls == before + 1


def test_a_detector_learns_from_its_losses():
    model = converted("Detector")
    images, targets = zoo.batch("Detector")
    losses = model(images, targets)
    assert set(losses) == {"boxes", "scores"}
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in trained(model))
    assert [set(found) for found in model.eval()(images)] == [{"boxes", "scores"}] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["SqueezeExcite", "VisionTransformer", "LayerScale", "Detector"])
@pytest.mark.slow
def test_half_precision_weights(name, dtype):
    model, full = converted(name, dtype, gate=None), converted(name, gate=None)
    outputs = model(*zoo.batch(name, dtype))
    assert {leaf.dtype for leaf in leaves(outputs)} == {dtype}
    got = torch.autograd.grad(score(outputs), trained(model))
    want = torch.autograd.grad(score(full(*zoo.batch(name))), trained(full))
    largest = max(other.norm() for other in want)
    for one, other in zip(got, want, strict=True):
        assert one.dtype == dtype
        if other.norm() > 0.05 * largest:
            assert torch.cosine_similarity(one.float().flatten(), other.flatten(), dim=0) > 0.95


@pytest.mark.parametrize("name", ["SqueezeExcite", "LayerScale", "VisionTransformer"])
@pytest.mark.slow
def test_channels_last(name):
    model, (x,) = converted(name), zoo.batch(name)
    last = x.to(memory_format=torch.channels_last)
    assert_relatively_close(model(last), model(x), 1e-4)
    got = torch.autograd.grad(score(model(last)), trained(model))
    want = torch.autograd.grad(score(model(x)), trained(model))
    assert_gradients_close(got, want, 0.02)


def test_gates_of_a_network_that_returns_a_dataclass_learn():
    model = converted("DataclassOutput", gate=GateConfig(target=0.1, weight=10.0, by="cell"))
    plain = converted(
        "DataclassOutput", gate=GateConfig(target=0.1, weight=10.0, by="cell"), memory=EXACT
    )
    plain.gate_loss_scale = 0.0
    x = zoo.batch("DataclassOutput")
    pairs = [torch.autograd.grad(score(m(*x)), trained(m)) for m in (model, plain)]
    assert any((a - b).norm() > 0.1 * b.norm() for a, b in zip(*pairs, strict=True))


@pytest.mark.parametrize("name", ["SqueezeExcite", "VisionTransformer", "Detector", "MLP"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.slow
def test_nothing_is_kept_without_gradients(name, context):
    model = converted(name)
    expected = [leaf.detach() for leaf in leaves(model(*zoo.batch(name)))]
    with context():
        assert saved_activation_bytes(model, *zoo.batch(name)) == 0
        got = list(leaves(model(*zoo.batch(name))))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
