"""What stays Python, what becomes a graph, and of which copy."""

import copy

import pytest
import torch
from helpers import models, zoo
from helpers.comparing import (
    assert_relatively_close,
)
from torch import nn

from lightning_da3 import (
    AdapterConfig,
    ConversionError,
    ConversionWarning,
    DA3Config,
    InputError,
    convert,
)
from lightning_da3.model.original import Original

ADAPTER = AdapterConfig(hidden_channels=4, max_cells=16, min_stride=1)


CONFIG = DA3Config(adapter=ADAPTER, head=None)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("name", "python"),
    [
        ("Detector", "it decides on the size of its input"),
        ("ControlFlowOnData", "it decides on the values of a tensor"),
        ("CountsCalls", "its forward changes the attributes ['calls']"),
        ("PartsChangedInPlace", "it reads add after mul_ wrote to it through another name"),
    ],
)
def test_what_stays_python_is_named_and_its_children_are_graphs(name, python):
    plan = convert(zoo.network(name), CONFIG).plan
    assert len(plan.python) == 1
    assert python in plan.python[0][1]
    assert len(plan.parts) >= 2
    assert "stays Python: the network" in str(plan)


def test_many_modules_that_stay_python_for_one_reason_are_one_line():
    class Sized(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            return self.conv(x) * int(x.shape[-1])

    plan = convert(nn.Sequential(*(Sized() for _ in range(6))), CONFIG).plan
    (line,) = (line for line in plan.headline.splitlines() if "stays Python" in line)
    assert line.startswith("stays Python: 0, 1, 2 and 3 more, Sized: it decides on the size")
    assert "stays Python: 0, 1, 2, 3, 4, 5, Sized" in str(plan)


def test_the_length_of_a_tensor_is_no_reason_to_stay_python():
    model = convert(zoo.network("VisionTransformer"), CONFIG)
    assert model.plan.python == ()
    assert [host.prefix_tokens for host in model.plan.hosts] == [1] * 3
    for count in (1, 3):
        assert model(torch.randn(count, 3, 12, 12)).shape == (count, models.CLASSES)


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


def test_an_argument_that_forward_branches_on_is_as_it_is_by_default():
    net = zoo.network("Pair").eval()
    model, (image, depth) = convert(net, CONFIG), zoo.batch("Pair")
    got = model(image, depth=depth, scale=2.0)
    assert_relatively_close(got, net(image, depth, scale=2.0), 1e-5)
    assert_relatively_close(model(image, depth, mask=None), net(image, depth), 1e-5)
    mask = torch.rand(2, 1, 12, 12)
    with pytest.warns(ConversionWarning, match=r"traced once more, .*`mask` was traced as None"):
        got = model(image, depth, mask=mask)
    assert_relatively_close(got, net(image, depth, mask=mask), 1e-5)
    again = copy.deepcopy(model)
    vars(again)["original"] = Original()  # as where a saved one forgot its network
    with pytest.raises(InputError, match=r"`mask` was traced as None, which .* branches on"):
        again(image, depth, mask=mask)

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
