"""Conversion: what it computes, what it leaves alone, what it keeps, and its gradients."""

import copy
import io
import itertools
import operator
import pickle

import pytest
import torch
import torchvision
from helpers import models
from helpers.comparing import (
    add,
    assert_identical,
    assert_relatively_close,
    gradients,
    mix_gates_,
    photograph,
    score,
)
from plain import PlainPyTorch
from torch import nn

from lightning_da3 import (
    AdapterConfig,
    ConfigError,
    ConversionError,
    DA3Config,
    GateConfig,
    InputError,
    MemoryConfig,
    convert,
    step_costs,
)
from lightning_da3.layers import Replacement, register
from lightning_da3.memory import SavedActivations, saved_activation_bytes
from lightning_da3.nn.adapter import HostInput, HostOutput
from lightning_da3.nn.frozen import FrozenAffine, FrozenConv, PiecewiseLinear, Sum
from lightning_da3.ops.activation import RELU
from lightning_da3.planning.plan import NodePlan, Plan

EXACT = MemoryConfig(exact=True)
WITH_MODES = (nn.Dropout, nn.BatchNorm2d)
SLOW_FAMILIES = ("inception_v3", "googlenet", "vgg11_bn")
FAMILY_NAMES = [
    pytest.param(name, marks=pytest.mark.slow) if name in SLOW_FAMILIES else name
    for name in models.FAMILIES
]


# PyTorch's own network of an even kernel warns; conversion pads itself
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def choose(name="", **choices):
    """A config for tiny networks: adapters everywhere, and small."""
    adapter = AdapterConfig(hidden_channels=4, max_cells=16, min_stride=1)
    head = None if name in models.WITHOUT_A_HEAD else "auto"
    return DA3Config(**{"adapter": adapter, "head": head, **choices})


def network(name):
    return models.family(name) if name in models.FAMILIES else models.zoo(name)


def converted(name, dtype=torch.float32, **choices):
    model = add(convert(network(name).to(dtype), choose(name, **choices)), "a")
    model.set_domain("a")
    mix_gates_(model, models.inputs(name, dtype))
    return model.train()


# --- the network stays what it was


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
    net = models.randomise_(models.AlwaysDropout())
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


# --- gradients, against plain PyTorch


GRADIENT_FAMILIES = ["resnet18", "resnext", "mobilenet_v2", "shufflenet_v2_x0_5", "squeezenet1_1"]
GRADIENT_FAMILIES += [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("densenet", "regnet_x_400mf", "mnasnet0_5", "alexnet", *SLOW_FAMILIES)
]
CASES = [*models.ZOO, *GRADIENT_FAMILIES]


@pytest.mark.parametrize(
    "gate", [None, GateConfig(target=0.3, weight=10.0)], ids=["plain", "gated"]
)
@pytest.mark.parametrize("name", CASES)
def test_exact_gradients_are_those_of_plain_pytorch(name, gate):
    model = converted(name, torch.float64, gate=gate, memory=EXACT)
    plain = PlainPyTorch(network(name).double(), model)
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
    rounding = 1e-6 * max(other.norm() for other in want)
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
    assert all((one - other).norm() <= 0.02 * other.norm() for one, other in pairs)


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


# --- what is kept


def test_saved_bytes_of_resnet18_are_far_below_fine_tuning():
    net = models.family("resnet18").train()
    x = torch.randn(4, 3, 64, 64)
    fine_tuning = saved_activation_bytes(net, x)
    model = convert(net)
    model.add_domain("a", 10)
    model.set_domain("a")
    ours = saved_activation_bytes(model.train(), x)
    assert 0 < ours <= fine_tuning / 11  # measured: 1/11.8; the adapters weigh most on small maps


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
    names = [name.removeprefix("backbone.").removeprefix("frozen_") for name in saved.by_module]
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


# --- the plan


def steps(name, **choices):
    plan = convert(network(name), choose(name, **choices)).plan
    return plan, {step.name: step for step in plan.nodes}


def test_plan_of_convolutions_and_norms():
    plan, step = steps("ConvNorm")
    assert plan.nodes[:5] == (
        NodePlan("conv1", "Conv2d", "freeze"),
        NodePlan("norm1", "BatchNorm2d", "fold", fold_into="conv1"),
        NodePlan("relu", "ReLU", "replace", "bits", inplace=True),
        NodePlan("drop", "Dropout", "remove"),
        NodePlan("conv2", "Conv2d", "freeze"),
    )
    assert step["fc"] == NodePlan("fc", "Linear", "leave", "head")
    assert plan.network == "ConvNorm"
    assert plan.head == "fc"
    assert plan.input_channels == (2, 3)
    first, second = plan.hosts
    assert (first.name, first.readers, first.last) == ("conv1", ("conv1",), "norm1")
    assert (first.in_channels, first.out_channels, first.stride) == (3, 4, (2, 2))
    assert first.macs_per_output == 3 * 4 * 9
    assert (second.in_channels, second.out_channels, second.stride) == (4, 6, (1, 1))


class Fusable(nn.Module):
    """What may become one operation with the convolution before it, and what may not."""

    def __init__(self):
        super().__init__()
        self.host, self.behind_a_host = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()
        self.point, self.norm, self.fused = nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.ReLU6()
        self.pooled, self.before_a_pool, self.pool = nn.Conv2d(6, 6, 1), nn.ReLU(), nn.MaxPool2d(2)
        self.read_twice, self.other = nn.Conv2d(6, 6, 1), nn.ReLU()
        self.shared, self.first, self.second = nn.Conv2d(6, 6, 1), nn.ReLU(), nn.LeakyReLU(0.2)
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        x = self.behind_a_host(self.host(x))
        x = self.fused(self.norm(self.point(x)))
        x = self.pool(self.before_a_pool(self.pooled(x)))
        y = self.read_twice(x)
        x = self.other(y) + y
        x = self.second(self.shared(self.first(self.shared(x))))
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("exact", [False, True])
def test_an_activation_becomes_one_operation_with_the_convolution_that_it_alone_reads(exact):
    torch.manual_seed(0)
    network = Fusable().eval()
    config = DA3Config(AdapterConfig(4, min_stride=1), memory=MemoryConfig(exact=exact))
    model = convert(network, config, example_inputs=torch.randn(2, 3, 8, 8))
    assert {step.name for step in model.plan.nodes if step.action == "fuse"} == {
        "fused",
        "before_a_pool",
    }
    step = next(step for step in model.plan.nodes if step.name == "fused")
    assert (step.fold_into, step.keeps) == ("point", "bits")
    fused = [m for m in model.backbone.modules() if isinstance(m, FrozenConv) and m.slopes]
    assert sorted(conv.slopes.high for conv in fused) == [6.0, torch.inf]
    rows = {row.name: row for row in step_costs(model, 2, 8).rows}
    assert rows["point"].flops_forward > 0 == rows["point"].saved_bytes
    assert rows["fused"].flops_forward == 0
    assert rows["fused"].saved_bytes == 2 * 6 * 8 * 8 // 8


class Sums(nn.Module):
    """Sums whose first operand nobody else reads, one that is read again, one that broadcasts."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.third, self.fc = nn.Conv2d(4, 4, 1), nn.Linear(4, 2)

    def forward(self, x):
        x = self.first(x)
        y = self.second(x) + x
        z = y + x
        w = self.third(z).mean((2, 3), keepdim=True) + z
        return self.fc((w + y).mean((2, 3)))


def test_sums_are_written_where_nobody_else_reads():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 6)
    model = convert(Sums().eval(), DA3Config(AdapterConfig(4, min_stride=1)), example_inputs=x)
    actions = {step.name: (step.action, step.inplace) for step in model.plan.nodes}
    assert actions["add"] == actions["add_3"] == ("accumulate", True)
    assert actions["add_1"] == actions["add_2"] == ("leave", False)


def test_a_sum_takes_the_wider_type_and_shape():
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    total = x + y
    assert Sum()(x, y) is x
    torch.testing.assert_close(x, total, rtol=0, atol=0)
    assert Sum(inplace=False)(x, y) is not x
    narrow = torch.randn(2, 1)
    torch.testing.assert_close(Sum()(narrow, y), narrow + y, rtol=0, atol=0)
    half = torch.randn(2, 3).bfloat16()
    assert Sum()(half, y).dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "norm", "action", "inplace"),
    [
        ("SharedLayers", "norm", "affine", True),  # called twice
        ("SharedConv", "norm2", "affine", True),  # its convolution is
        ("TwoReaders", "norm", "affine", False),  # someone else reads the convolution
        ("NormFirst", "norm1", "affine", False),  # reads the network's input
        ("NormFirst", "norm2", "affine", True),  # reads a fresh concatenation
        ("NormOfTheBatch", "norm", "leave", False),  # has no statistics
        ("Residual", "down_1", "fold", False),
    ],
)
def test_plan_of_a_batch_norm(name, norm, action, inplace):
    _, step = steps(name)
    assert (step[norm].action, step[norm].inplace) == (action, inplace)


def test_plan_of_a_layer_that_is_called_twice():
    plan, _ = steps("SharedLayers")
    assert [host.name for host in plan.hosts] == ["conv", "conv:2"]
    model = converted("SharedLayers")
    frozen = [m for m in model.backbone.modules() if isinstance(m, FrozenConv)]
    assert len(frozen) == 2  # the stem, and one for both calls
    assert len(model.domain("a").adapters) == 2


def test_plan_of_functions_and_methods():
    _, step = steps("Functional")
    actions = {name: (plan.action, plan.keeps) for name, plan in step.items()}
    bits = ("replace", "bits")
    for name in ("relu", "relu_1", "relu_", "hardtanh", "relu6", "leaky_relu"):
        assert actions[name] == bits
    assert actions["max_pool2d"] == ("replace", "bits")
    assert actions["avg_pool2d"] == actions["adaptive_avg_pool2d"] == ("replace", "nothing")
    assert actions["dropout"] == ("remove", "nothing")


@pytest.mark.parametrize("name", ["InplaceThenReused", "InplaceThenOutOfPlace"])
def test_plan_writes_only_into_memory_that_nobody_else_reads(name):
    _, step = steps(name)
    assert step["relu"].inplace  # as the user's own
    assert not step["hardtanh"].inplace


def test_plan_of_a_depthwise_block_is_one_host_between_its_narrow_ends():
    plan, step = steps("Depthwise")
    stem, block = plan.hosts
    assert stem.name == "stem"
    assert (block.name, block.readers, block.last) == ("block.3", ("block_0",), "block_7")
    assert (block.in_channels, block.out_channels) == (4, 4)
    assert block.macs_per_output == 4 * 12 + 12 * 9 + 12 * 4
    assert step["block_2"].keeps == step["block_5"].keeps == "bits"


def test_plan_of_a_strided_depthwise_block_counts_what_runs_before_the_stride():
    plan = convert(models.family("mobilenet_v2"), choose()).plan
    host = next(host for host in plan.hosts if host.name == "features.2.conv.1.0")
    assert host.stride == (2, 2)
    c, wide, out = 8, 48, 8
    assert host.macs_per_output == 4 * c * wide + 9 * wide + wide * out


def test_min_stride_leaves_early_maps_alone():
    plan, step = steps("Residual", adapter=AdapterConfig(min_stride=4))
    assert [host.name for host in plan.hosts] == ["conv1", "conv2"]
    assert step["relu"].keeps == "nothing"  # upstream of the first host
    assert step["relu_1"].keeps == "bits"


@pytest.mark.parametrize(
    ("whole", "least"), [(2, 2), (4, 4), (8, 8), (16, 8), (24, 12), (32, 16), (128, 16)]
)
def test_by_default_hosts_begin_behind_half_of_the_downsampling(whole, least):
    """At least 8, or as far as it goes, and at most 16."""

    def conv(stride):
        return nn.Conv2d(3, 3, 3, stride=stride, padding=1)

    strides = [2, 2, 2, 3] if whole == 24 else [2] * (whole.bit_length() - 1)
    network = nn.Sequential(*[conv(s) for s in strides], conv(1), nn.Flatten(1), nn.LazyLinear(2))
    size = 2 * whole
    network(torch.randn(1, 3, size, size))
    plan = convert(network, example_inputs=torch.randn(1, 3, size, size)).plan
    at = itertools.accumulate([*strides, 1], operator.mul)  # the output of every convolution
    assert len(plan.hosts) == sum(reduction >= least for reduction in at)


def test_a_host_that_begins_where_another_ends_reads_what_was_written():
    """Also where the output has memory of its own, which the other's adapter alone writes to."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1))
    model = add(convert(network, choose(head=None)), "a")
    model.set_domain("a")
    for output in model.modules():
        if isinstance(output, HostOutput):
            output.inplace = False
    seen = {}
    for name, module in model.backbone.named_modules():
        if isinstance(module, HostInput | HostOutput | FrozenConv):
            module.register_forward_hook(lambda m, x, y, name=name: seen.update({name: (x[0], y)}))
    with torch.no_grad():
        next(iter(model.domain("a").adapters.values())).value.bias.add_(1.0)
    model(torch.randn(2, 3, 6, 6))
    written, read = seen["host_outputs.0"][1][0], seen["host_inputs.1"]
    assert not torch.equal(written, seen["host_outputs.0"][0])
    assert read[0] is written
    assert seen["1"][0] is read[1][0]  # through the input, whose backward adds to its gradient


def test_plan_of_other_axes():
    plan, step = steps("OtherAxes")
    assert [host.name for host in plan.hosts] == ["conv", "row.0", "block.0"]
    assert [host.stride for host in plan.hosts] == [(1, 1), (2,), (1, 2, 2)]
    assert step["row_0"].action == step["block_0"].action == "freeze"
    assert step["row_1"].action == step["block_1"].action == "fold"
    assert step["row_3"].keeps == step["block_2"].keeps == "bits"


def test_plan_says_what_is_left_to_pytorch():
    plan, _ = steps("OwnFunction")
    assert plan.left_to_pytorch == ("own_function",)
    assert str(plan).endswith("\nleft to PyTorch (more memory): own_function")


def test_plan_of_smooth_activations():
    """Their derivative is coded; in exact mode a region is computed again instead."""
    _, step = steps("Activations")
    assert step["layers_9"].keeps == "codes"
    plan, step = steps("Activations", memory=EXACT)
    assert step["layers_9"].keeps == "recomputed"
    assert plan.left_to_pytorch == ()


def test_derivatives_of_smooth_activations_in_4_bits():
    x = models.inputs("Activations")
    coarse = converted("Activations", memory=MemoryConfig(derivative_bits=4))
    fine = converted("Activations")
    saved = saved_activation_bytes(fine, *x) - saved_activation_bytes(coarse, *x)
    assert saved == 2 * 4 * 12 * 12 / 2  # half a byte for every element of the one GELU
    cosine = torch.nn.functional.cosine_similarity
    for one, other in zip(gradients(coarse, x), gradients(fine, x), strict=True):
        assert cosine(one.flatten(), other.flatten(), dim=0) > 0.98


def test_plan_prints_as_a_table():
    plan, _ = steps("ConvNorm")
    assert Plan.__str__(plan).splitlines() == [  # without what a step costs
        "ConvNorm: 2 hosts, head: fc",
        "node     layer                action   keeps    host",
        "conv1    Conv2d               freeze   nothing  reads conv1",
        "norm1    BatchNorm2d          fold     nothing  writes conv1",
        "relu     ReLU                 replace_ bits",
        "drop     Dropout              remove   nothing",
        "conv2    Conv2d               freeze   nothing  reads conv2",
        "norm2    BatchNorm2d          fold     nothing  writes conv2",
        "relu_1   ReLU                 replace_ bits",
        "pool     AdaptiveAvgPool2d    replace  nothing",
        "flatten  flatten              leave    nothing",
        "fc       Linear               leave    head",
    ]


def test_plan_is_a_value():
    one, other = (convert(network("Residual"), choose()).plan for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)
    assert one != convert(network("Residual"), choose(head=None)).plan


def test_the_rewritten_network_has_what_the_plan_says():
    model = converted("TwoReaders")
    kinds = {type(module) for module in model.backbone.modules()}
    assert {FrozenConv, FrozenAffine, PiecewiseLinear} <= kinds
    assert not {nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.AdaptiveAvgPool2d} & kinds


@pytest.mark.parametrize(
    ("name", "head"), [("ConvHead", "score"), ("squeezenet1_1", "classifier.1"), ("Pools", "fc")]
)
def test_the_classifier_is_found(name, head):
    model = converted(name)
    assert model.plan.head == head
    assert model(*models.inputs(name)).shape == (2, 3)


# --- copies


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


# --- refusals


def refused(net, *parts, **choices):
    with pytest.raises(ConversionError) as caught:
        convert(net, choose(**choices))
    for part in parts:
        assert part in str(caught.value)


def test_a_second_conversion_is_refused():
    model = converted("Residual")
    refused(model, "DA3Model is converted already", "call `add_domain`")
    refused(nn.Sequential(model, nn.ReLU()), "Sequential is converted already")


def test_a_network_with_nothing_to_adapt_is_refused():
    refused(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), "nothing to adapt", "['Linear', 'ReLU']")
    refused(nn.LSTM(3, 4), "nothing to adapt", "LSTM")


def test_hosts_are_where_maps_are_smallest_if_none_is_as_small_as_asked():
    """A network for small images is never downsampled by 8."""
    plan, _ = steps("Residual", adapter=AdapterConfig())
    assert [host.name for host in plan.hosts] == ["conv1", "conv2"]


def test_a_network_of_linear_layers_alone_has_hosts_too():
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    model = add(convert(net, choose()), "a")
    assert [(host.name, host.stride) for host in model.plan.hosts] == [("0", None), ("2", None)]
    assert model.plan.head == "4"
    model.set_domain("a")
    x = torch.randn(5, 6)
    assert model(x).shape == (5, 3)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.domain("a").parameters())


class BranchesOnValues(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Uncopyable(nn.Module):
    def __deepcopy__(self, memo):
        raise RuntimeError("one of a kind")


def test_a_network_that_cannot_be_copied_or_has_no_layers_is_refused():
    refused(BranchesOnValues(), "nothing to adapt", "control flow")
    refused(Uncopyable(), "Uncopyable cannot be copied", "one of a kind")


@pytest.mark.filterwarnings("ignore")  # of PyTorch about its own quantization
def test_a_quantized_network_is_refused_with_its_float_twin():
    torch.backends.quantized.engine = torch.backends.quantized.supported_engines[-1]
    net = torchvision.models.get_model("quantized_shufflenet_v2_x0_5", quantize=True)
    refused(net, "is quantized", "pass no gradient back", "torchvision.models.shufflenetv2.Shuffle")


def test_a_head_that_cannot_be_found_is_the_networks_own():
    class TwoHeads(models.ConvNorm):
        def __init__(self):
            super().__init__()
            self.more = nn.Linear(6, models.CLASSES)

        def forward(self, x):
            features = self.pool(self.features(x)).flatten(1)
            return self.fc(features) + self.more(features)

    model = convert(TwoHeads(), choose())
    assert model.plan.head is None
    model.add_domain("own")
    with pytest.raises(ConfigError, match="no single Linear or convolution leads to the output"):
        model.add_domain("new", num_classes=3)
    refused(network("ConvNorm"), "no Linear or convolution named 'fcc'", "'fc'", head="fcc")


def test_wrong_arguments_are_refused():
    with pytest.raises(ConfigError, match=r"`backbone` must be a torch.nn.Module, got str"):
        convert("resnet18")
    with pytest.raises(ConfigError, match="`config` must be a DA3Config, got dict"):
        convert(network("ConvNorm"), {})


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


# --- layers of one's own


class Doubles(nn.Module):
    def forward(self, x):
        return x * 2


class DoublesSlowly(Doubles):
    pass


def test_users_register_their_own_layers():
    class Frozen(nn.Module):
        def forward(self, x):
            return x + x

    @register(Doubles)
    def _doubles(layer):
        return Replacement(lambda inplace: Frozen())

    def tracer_sees(kind):
        net = nn.Sequential(nn.Conv2d(3, 4, 3), kind(), nn.Conv2d(4, 4, 3))
        return convert(net, choose(head=None))

    # both compute the same; the exact type alone has the rule
    for kind in (Doubles, DoublesSlowly):
        model = tracer_sees(kind)
        assert model(torch.zeros(1, 3, 6, 6)).shape == (1, 4, 2, 2)
    with pytest.raises(ConfigError, match="Doubles has a rule already: _doubles"):
        register(Doubles)(lambda layer: None)
    with pytest.raises(ConfigError, match=r"takes types of torch.nn.Module, got 'ReLU'"):
        register("ReLU")(lambda layer: None)


# --- layers of users


class Negate(nn.Module):
    def forward(self, x):
        return -x if self.training else x.clamp(min=0)  # the branch and the method hide what it is


@register(Negate)
def _negate(layer):
    return Replacement(lambda overwrite: PiecewiseLinear(RELU, overwrite), "bits", False)


def test_a_registered_layer_is_replaced():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), Negate(), nn.Flatten(1), nn.LazyLinear(3)
    )
    x = torch.randn(2, 3, 8, 8)
    expected = net.eval()(x)
    model = convert(net, choose())
    (step,) = [step for step in model.plan.nodes if step.layer == "Negate"]
    assert (step.action, step.keeps, step.inplace) == ("replace", "bits", True)
    torch.testing.assert_close(model.train()(x), expected)


def test_a_type_has_one_rule_and_is_a_module():
    with pytest.raises(ConfigError, match="Negate has a rule already: _negate"):
        register(Negate)(_negate)
    with pytest.raises(ConfigError, match="`register` takes types"):
        register(int)(_negate)
