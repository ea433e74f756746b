"""Networks as users write them: each converts, computes the same and has the right gradients."""

import dataclasses

import pytest
import torch
from helpers import models, zoo
from helpers.comparing import (
    add,
    assert_relatively_close,
    leaves,
    mix_gates_,
    photograph,
    score,
)
from torch import nn

from lightning_da3 import (
    AdapterConfig,
    CheckpointError,
    ConversionError,
    DA3Config,
    GateConfig,
    InputError,
    MemoryConfig,
    convert,
)
from lightning_da3.memory import saved_activation_bytes
from lightning_da3.reference import PlainPyTorch

EXACT = MemoryConfig(exact=True)
ADAPTER = AdapterConfig(hidden_channels=4, max_cells=16, min_stride=1)
CONFIG = DA3Config(adapter=ADAPTER, head=None)
GATES = [None, GateConfig(target=0.3, weight=10.0)]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def converted(name, dtype=torch.float32, **choices):
    config = DA3Config(**{"adapter": ADAPTER, "head": None, **choices})
    model = add(convert(zoo.network(name).to(dtype), config), "a")
    model.set_domain("a")
    mix_gates_(model, zoo.batch(name, dtype))
    return model.train()


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


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


@pytest.mark.parametrize("gate", GATES, ids=["plain", "gated"])
@pytest.mark.parametrize("name", zoo.ZOO)
def test_gradients_are_those_of_plain_pytorch(name, gate):
    model = converted(name, torch.float64, gate=gate, memory=EXACT)
    plain = PlainPyTorch(zoo.network(name).double(), model)
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
    outputs = coded(*zoo.batch(name, torch.float64))
    assert_relatively_close(outputs, expected, 1e-9)
    for one, other in zip(torch.autograd.grad(score(outputs), trained(coded)), want, strict=False):
        if other.norm() > 1e-3 * largest:  # else the direction is of rounding
            assert torch.cosine_similarity(one.flatten(), other.flatten(), dim=0) >= 0.999


# --- what the plans say


def test_functions_of_constant_weights_keep_nothing():
    steps = convert(zoo.network("FunctionsWithOwnWeights"), CONFIG).plan.nodes
    functions = [step for step in steps if step.layer in ("conv1d", "conv2d")]
    assert len(functions) == 3
    assert {(step.action, step.keeps) for step in functions} == {("freeze", "nothing")}


def test_a_layer_that_computes_its_weight_is_that_layer():
    net = zoo.network("StandardisedWeights")
    model = convert(net, CONFIG)
    assert [host.name for host in model.plan.hosts] == ["stem", "conv", "last"]
    with pytest.raises(CheckpointError, match="'conv' is computed from other tensors"):
        model.load_state_dict(net.state_dict())


class NormAndActivation(nn.BatchNorm2d):
    """As networks of others fuse them: the function, and what follows."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x):
        weight, bias = self.weight, self.bias
        x = nn.functional.batch_norm(
            x, self.running_mean, self.running_var, weight, bias, self.training, 0.1, self.eps
        )
        return self.act(x)


class CastingLinear(nn.Linear):
    def forward(self, input):  # noqa: A002
        return nn.functional.linear(input, self.weight, bias=self.bias)


class NormOfOtherWeights(nn.LayerNorm):
    def forward(self, x):
        return nn.functional.layer_norm(x, self.normalized_shape, self.weight + 1.0, self.bias)


class OwnLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), NormAndActivation(4)
        self.mix, self.scale = CastingLinear(4, 4), NormOfOtherWeights(4, eps=1e-3)
        self.fc = CastingLinear(4, 5)

    def forward(self, x):
        x = self.mix(self.norm(self.conv(x)).movedim(1, -1))
        return self.fc(self.scale(x).mean((1, 2)))


def test_functions_of_a_layer_s_own_weights_are_that_layer():
    net = models.randomise_(OwnLayers()).double().eval()
    model = convert(net, DA3Config(adapter=ADAPTER))
    step = {step.name: step for step in model.plan.nodes}
    assert step["batch_norm"].action == "fold"
    assert [s.layer for s in model.plan.nodes].count("Linear") == 2
    assert model.plan.head == "fc"
    assert step["layer_norm"].layer == "layer_norm"  # of another eps than the layer's own
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    assert_relatively_close(model(x), net(x), 1e-9)
    assert type(net.norm) is NormAndActivation
    other = models.randomise_(OwnLayers(), 5).double().eval()
    model.load_state_dict(other.state_dict())
    assert_relatively_close(model(x), other(x), 1e-9)


def test_a_function_of_weights_that_depend_on_the_input_stays():
    class Dynamic(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.kernel = nn.Conv2d(3, 4, 3), nn.Linear(3, 4 * 4)

        def forward(self, x):
            kernel = self.kernel(x.mean((0, 2, 3))).view(4, 4, 1, 1)
            return torch.conv2d(self.conv(x), kernel)

    net, x = Dynamic().double(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    model = convert(net, DA3Config(adapter=ADAPTER, head=None, memory=EXACT))
    (step,) = [step for step in model.plan.nodes if step.layer == "conv2d"]
    assert step.action == "leave"
    x, y = x.clone().requires_grad_(), x.clone().requires_grad_()
    model(x).square().sum().backward()
    net(y).square().sum().backward()
    assert_relatively_close(x.grad, y.grad, 1e-9)


@pytest.mark.parametrize(
    ("name", "python"),
    [
        ("Detector", "Proxy object cannot be iterated"),
        ("ControlFlowOnData", "float() argument"),
        ("CountsCalls", "its forward changes the buffers ['calls']"),
        ("PartsChangedInPlace", "it changes a part of add, which it reads afterwards"),
    ],
)
def test_what_stays_python_is_named_and_its_children_are_graphs(name, python):
    plan = convert(zoo.network(name), CONFIG).plan
    assert len(plan.python) == 1
    assert python in plan.python[0][1]
    assert len(plan.parts) >= 2
    assert "stays Python: the network" in str(plan)


def test_the_length_of_a_tensor_is_no_reason_to_stay_python():
    model = convert(zoo.network("VisionTransformer"), CONFIG)
    assert model.plan.python == ()
    assert [host.prefix_tokens for host in model.plan.hosts] == [1, 1, 1, 1]
    for count in (1, 3):
        assert model(torch.randn(count, 3, 12, 12)).shape == (count, zoo.CLASSES)


def test_patches_are_embedded_as_they_were_if_there_is_more_to_adapt():
    patches = nn.Conv2d(3, 8, 4, stride=4)
    alone = nn.Sequential(patches, nn.Flatten(1), nn.Linear(72, 2))
    more = nn.Sequential(patches, nn.Conv2d(8, 8, 3, padding=1), nn.Flatten(1), nn.Linear(72, 2))
    x = torch.randn(2, 3, 12, 12)
    found = [[h.name for h in convert(n, CONFIG, x).plan.hosts] for n in (alone, more)]
    assert found == [["0"], ["1"]]


def test_views_that_channels_last_maps_do_not_have_are_copies():
    class Flat(nn.Module):
        def __init__(self, python):
            super().__init__()
            self.python, self.conv1 = python, nn.Conv2d(3, 8, 3, padding=1)
            self.conv2, self.fc = nn.Conv2d(8, 4, 3, padding=1), nn.Linear(64, 2)

        def forward(self, x):
            if self.python and x.sum() > 1e9:
                x = -x
            x = self.conv2(self.conv1(x).relu())
            like = x.new_empty(len(x), 64)
            return self.fc(x.view(x.size(0), -1) + x.view_as(like))

    x = torch.randn(2, 3, 4, 4)
    for python in (False, True):
        network = Flat(python).eval()
        model = convert(network, dataclasses.replace(CONFIG, head=None), x)
        assert bool(model.plan.python) is python
        assert_relatively_close([model(x)], [network(x)], 1e-5)


@pytest.mark.parametrize("axes", [2, 1])
def test_what_writes_through_a_view_writes_into_the_map_or_is_refused(axes):
    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 2)

        def forward(self, x):
            x = self.conv(x).view(x.dtype)
            x.view(size=(len(x), 8, -1) if axes == 2 else (len(x), -1)).mul_(2.0)
            return self.fc(x.mean((2, 3)))

    network, x = Written().eval(), torch.randn(2, 3, 4, 4)
    if axes == 2:  # the view exists
        assert_relatively_close([convert(network, CONFIG, x)(x)], [network(x)], 1e-5)
    else:
        with pytest.raises(ConversionError, match=r"`mul_` writes through a view.*contiguous"):
            convert(network, CONFIG, x)


def test_maps_come_out_laid_out_as_the_input_is():
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1))
    model = convert(network, dataclasses.replace(CONFIG, head=None))
    x = torch.randn(2, 3, 4, 4)
    assert model(x).view(-1).shape == (128,)
    last = model(x.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert_relatively_close([last], [model(x)], 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["GatedLinearUnits", "VisionTransformer", "Recurrent"])
def test_the_plan_is_the_same_for_every_type(name, dtype):
    plans = [convert(zoo.network(name).to(d), CONFIG).plan for d in (torch.float32, dtype)]
    assert plans[0] == plans[1]
    assert plans[0].regions


def test_a_list_of_blocks_in_an_untraceable_network_is_looked_into():
    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(zoo.SqueezeExcite() for _ in range(2))

        def forward(self, x):
            return sum(block(x) for block in self.blocks) if float(x.sum()) > -1e9 else x

    net, x = Blocks().eval(), torch.randn(2, 3, 8, 8)
    model = convert(net, CONFIG)
    assert {part.path[:8] for part in model.plan.parts} == {"blocks.0", "blocks.1"}
    assert_relatively_close(model(x), net(x), 1e-5)


def test_a_segment_begins_behind_what_is_removed():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
            self.drop, self.norm = nn.Dropout(), nn.GroupNorm(1, 4)

        def forward(self, x):
            x = self.conv(x)
            return self.last(self.norm(self.drop(x)).sigmoid() * nn.functional.silu(x))

    net, x = Branch().eval(), torch.randn(2, 3, 8, 8)
    model = add(convert(net, CONFIG), "a")
    (region,) = model.plan.regions
    assert (region.source, region.nodes[0]) == ("conv", "drop")
    assert_relatively_close(model(x), net(x), 1e-5)
    model.set_domain("a")
    model(x).sum().backward()
    assert all(p.grad is not None for p in trained(model))


def test_what_asserts_the_rank_of_a_layer_s_output_reads_nothing():
    model = convert(zoo.network("NormsThatAssert").eval(), CONFIG)
    actions = {node.name: node.action for node in model.plan.nodes}
    assert list(actions.values()).count("fold") == 3
    # behind a host its adapter lies between the two; else they meet past an Identity
    assert [actions[f"norm{i}_act"] for i in (1, 2, 3)] == ["replace", "replace", "fuse"]
    (total,) = (node for node in model.plan.nodes if node.layer == "add")
    assert (total.action, total.inplace) == ("accumulate", True)  # past a Dropout
    # what is not known beforehand is asserted as ever: of the input, and of a sum
    assert [node.layer for node in model.plan.nodes].count("_assert") == 2


def test_a_rank_that_is_wrong_is_found_when_it_runs():
    class Volumes(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, x):
            x = self.conv(x)
            torch._assert(x.dim() == 5, "expected volumes")
            return self.last(x) * x.ndim

    model = convert(Volumes(), CONFIG)
    with pytest.raises(AssertionError, match="expected volumes"):
        model(torch.randn(2, 3, 8, 8))


# --- arguments


def test_a_buffer_that_changes_in_forward_changes():
    model = converted("CountsCalls")
    before = model.backbone.calls.clone()
    model(*zoo.batch("CountsCalls"))
    assert model.backbone.calls == before + 1


def test_an_argument_that_forward_branches_on_is_as_it_is_by_default():
    net = zoo.network("Pair").eval()
    model, (image, depth) = convert(net, CONFIG), zoo.batch("Pair")
    got = model(image, depth=depth, scale=2.0)
    assert_relatively_close(got, net(image, depth, scale=2.0), 1e-5)
    assert_relatively_close(model(image, depth, mask=None), net(image, depth), 1e-5)
    mask = torch.rand(2, 1, 12, 12)
    with pytest.raises(InputError, match=r"`mask` was traced as None, which .* branches on"):
        model(image, depth, mask=mask)

    class Masked(nn.Module):  # as the message says
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, image, depth, mask):
            return self.net(image, depth, mask=mask)

    masked = convert(Masked().eval(), CONFIG)
    assert masked.plan.python == ()
    assert_relatively_close(masked(image, depth, mask), net(image, depth, mask=mask), 1e-5)


def test_a_python_parent_may_pass_what_is_none_by_default():
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x, mask=None):
            x = self.conv(x)
            return x if mask is None else x * mask

    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = Part()

        def forward(self, x):
            return self.part(x, x > 0) if float(x.sum()) > -1e9 else self.part(x)

    net, x = Parent().eval(), torch.randn(2, 3, 6, 6)
    assert_relatively_close(convert(net, CONFIG)(x), net(x), 1e-5)


def test_a_detector_learns_from_its_losses():
    model = converted("Detector")
    images, targets = zoo.batch("Detector")
    losses = model(images, targets)
    assert set(losses) == {"boxes", "scores"}
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in trained(model))
    assert [set(found) for found in model.eval()(images)] == [{"boxes", "scores"}] * 2


# --- weights


def test_layers_that_were_never_called_are_refused_and_then_taken():
    net = zoo.Lazy()
    with pytest.raises(ConversionError, match=r"never called, so they have no weights.*Run the"):
        convert(net, CONFIG)
    x = torch.randn(2, 3, 8, 8)
    net(x)
    assert_relatively_close(convert(net, CONFIG)(x), net.eval()(x), 1e-5)


def test_a_network_that_remembers_what_it_computed_is_copied():
    class Remembers(zoo.SqueezeExcite):
        def features(self, x):
            self.last = super().features(x)
            return self.last

    net, x = Remembers(), torch.randn(2, 3, 8, 8)
    net(x)
    assert net.last.grad_fn is not None
    assert_relatively_close(convert(net, CONFIG)(x), net.eval()(x), 1e-5)


def test_a_parametrised_network_still_trains_after_its_conversion():
    net = zoo.network("Parametrised")
    convert(net, CONFIG)
    net(*zoo.batch("Parametrised")).sum().backward()
    assert net.stem.parametrizations.weight.original0.grad.norm() > 0
    assert nn.utils.parametrize.is_parametrized(net.conv, "weight")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["SqueezeExcite", "VisionTransformer", "LayerScale", "Detector"])
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
def test_channels_last(name):
    model, (x,) = converted(name), zoo.batch(name)
    last = x.to(memory_format=torch.channels_last)
    assert_relatively_close(model(last), model(x), 1e-4)
    got = torch.autograd.grad(score(model(last)), trained(model))
    want = torch.autograd.grad(score(model(x)), trained(model))
    largest = max(other.norm() for other in want)
    for one, other in zip(got, want, strict=True):
        assert (one - other).norm() <= 0.02 * max(other.norm(), 0.05 * largest)


def test_gates_of_a_network_that_returns_a_dataclass_learn():
    model = converted("DataclassOutput", gate=GateConfig(target=0.1, weight=10.0))
    plain = converted("DataclassOutput", gate=GateConfig(target=0.1, weight=10.0), memory=EXACT)
    plain.gate_loss_scale = 0.0
    x = zoo.batch("DataclassOutput")
    pairs = [torch.autograd.grad(score(m(*x)), trained(m)) for m in (model, plain)]
    assert any((a - b).norm() > 0.1 * b.norm() for a, b in zip(*pairs, strict=True))


@pytest.mark.parametrize("name", ["SqueezeExcite", "VisionTransformer", "Detector", "MLP"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_nothing_is_kept_without_gradients(name, context):
    model = converted(name)
    expected = [leaf.detach() for leaf in leaves(model(*zoo.batch(name)))]
    with context():
        assert saved_activation_bytes(model, *zoo.batch(name)) == 0
        got = list(leaves(model(*zoo.batch(name))))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
