"""Networks as libraries write them: decorated forwards, outputs of types of their own, configs."""

import copy
import dataclasses
import functools
import pickle
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

from lightning_da3 import AdapterConfig, ConfigError, ConversionWarning, DA3Config, convert

CONFIG = DA3Config(adapter=AdapterConfig(hidden_channels=4, min_stride=1))


@dataclasses.dataclass
class Output(OrderedDict):
    """A dictionary that is a dataclass, as transformers' outputs are."""

    logits: Tensor | None = None
    hidden: Tensor | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is not None:
                self[field.name] = getattr(self, field.name)


def returns_tuple(forward):
    """Pops an argument that the forward has not."""

    @functools.wraps(forward)
    def wrapper(self, *args, **kwargs):
        as_dict = kwargs.pop("return_dict", True)
        kwargs.setdefault("scale", self.scale)
        output = forward(self, *args, **kwargs)
        return output if as_dict else tuple(output.values())

    return wrapper


class Embedder(nn.Module):
    """Refuses other channels, and asks its layer for its type."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)

    @property
    def channels(self):
        return self.conv.in_channels

    def forward(self, x):
        if x.shape[1] != self.channels:
            raise ValueError("other channels")
        return self.conv(x.to(self.conv.weight.dtype))


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.embedder = 1.0, Embedder()
        self.deep = nn.Conv2d(8, 8, 3, padding=1)

    @returns_tuple
    def forward(self, pixels=None, mask=None, scale=None, **kwargs):
        if pixels is None:
            raise ValueError("no pixels")
        x = self.embedder(pixels).relu()
        if mask is not None:
            x = x * mask
        return Output(logits=x + self.deep(x) * scale, hidden=x)


class Classifier(nn.Module):
    def __init__(self, body=None):
        super().__init__()
        self.scale, self.body = 1.0, Body() if body is None else body
        self.dropout, self.classifier = nn.Dropout(0.5), nn.Linear(8, 5)

    @returns_tuple
    def forward(self, pixels=None, labels=None, scale=None, **kwargs):
        if pixels.dtype != self.classifier.weight.dtype:
            pixels = pixels.to(self.classifier.weight.dtype)
        features = self.body(pixels, **kwargs).logits
        logits = self.classifier(self.dropout(features.mean((2, 3))))
        return Output(logits=logits if labels is None else logits - labels)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def test_a_decorated_forward_is_one_graph_of_the_users_signature():
    network = Classifier().eval()
    model = convert(network, CONFIG)
    assert (model.plan.python, model.plan.head) == ((), "classifier")
    assert [host.name for host in model.plan.hosts] == ["body.embedder.conv", "body.deep"]
    for output in (model(X), model(pixels=X)):
        assert (type(output), list(output)) == (Output, ["logits"])
        torch.testing.assert_close(output.logits, network(X).logits)
    with pytest.warns(ConversionWarning, match="`labels` was traced as None"):
        got = model(X, labels=torch.zeros(5))
    torch.testing.assert_close(got.logits, network(X, labels=torch.zeros(5)).logits)
    torch.testing.assert_close(model(X, other=1).logits, network(X, other=1).logits)


class Counts(Body):
    """Notes its calls, which no graph holds."""

    calls = 0

    @returns_tuple
    def forward(self, pixels=None, scale=None, **kwargs):
        self.calls += 1
        x = self.embedder(pixels)
        return Output(logits=x + self.deep(x))


@pytest.mark.slow
def test_what_stays_python_gives_structures_whose_items_are_values():
    network = Classifier(Counts()).eval()
    model = convert(network, CONFIG, X)
    assert [path for path, _ in model.plan.python] == ["body"]
    assert (model.plan.head, len(model.plan.hosts)) == ("classifier", 2)
    other = torch.randn(5, 3, 16, 16)
    torch.testing.assert_close(model(other).logits, network(other).logits)


class Asks(nn.Module):
    """Decides on values, and asks its layers what they are."""

    def __init__(self):
        super().__init__()
        self.embedder, self.norm = Embedder(), nn.BatchNorm2d(8)
        self.prelu, self.head = nn.PReLU(), nn.Conv2d(8, 5, 1)

    def forward(self, x):
        if x.sum() > 1e9:
            x = x * 2
        conv = self.embedder.conv
        asked = (
            conv.stride,
            conv.in_channels,
            conv.kernel_size,
            conv.weight.shape,
            conv.bias.dtype,
        )
        assert asked == ((1, 1), 3, (3, 3), (8, 3, 3, 3), torch.float32)
        assert self.embedder.channels == 3
        assert self.norm.num_features == len(self.norm.weight) == len(self.norm.running_mean)
        assert self.prelu.weight.numel() == 1
        return {"out": self.head(self.prelu(self.norm(self.embedder(x)))).mean((2, 3))}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_replaced_layers_answer_what_code_asks_of_them(copied):
    network = Asks().eval()
    model = convert(network, CONFIG, X)
    assert "" in dict(model.plan.python)
    assert model.plan.head == "head"
    torch.testing.assert_close(copied(model)(X)["out"], network(X)["out"])
    model.add_domain("a", num_classes=7)
    model.set_domain("a")
    assert model(X)["out"].shape == (2, 7)


def features(*layers, act=nn.ReLU):
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(3, 8, 3, padding=1),
            norm=nn.BatchNorm2d(8),
            pool=nn.AdaptiveAvgPool2d(1),
            last=nn.Conv2d(8, 6, 1),
            act=act(),
            flatten=nn.Flatten(),
            **dict(layers),
        )
    )


@pytest.mark.parametrize(
    ("network", "head"),
    [
        (features(), None),
        (features(act=nn.Identity), "last"),
        (features(act=nn.Sigmoid), "last"),
        (features(("fc", nn.Identity()), act=nn.Dropout), None),
        (features(("fc", nn.Linear(6, 4))), "fc"),
    ],
)
def test_a_network_that_ends_in_features_has_no_head(network, head):
    assert convert(network, CONFIG, X).plan.head == head


def test_without_a_head_the_error_names_layers_of_this_network():
    model = convert(features(), CONFIG, X)
    with pytest.raises(
        ConfigError, match=r"outside of the network.*head=\.\.\..*\['conv', 'last'\]"
    ):
        model.add_domain("a", num_classes=3)
    with pytest.raises(Exception, match=r"named 'fc'.*\['conv', 'last'\].*head=None"):
        convert(features(), DA3Config(head="fc"))


class Captures(nn.Module):
    """Hooks into its stages by their class when it is first called, as transformers do."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList([Stage(3), Stage(8)])
        self.installed, self.seen = False, []

    def forward(self, x):
        if not self.installed:
            for module in self.modules():
                if isinstance(module, Stage):
                    module.register_forward_hook(lambda m, args, y: self.seen.append(y))
            self.installed = True
        for stage in self.stages:
            x = stage(x)
        seen, self.seen = self.seen, []
        return tuple(seen)


class Stage(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv, self.act = nn.Conv2d(channels, 8, 3, 2, 1), nn.ReLU()

    def forward(self, x):
        return self.act(self.conv(x))


class Decodes(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.classifier = Captures(), nn.Conv2d(8, 5, 1)

    def forward(self, x):
        first, second = self.encoder(x)
        return self.classifier(first[..., ::2, ::2] + second)


@pytest.mark.parametrize("inputs", [None, torch.zeros(2, 3, 16, 16)])
def test_what_a_network_hooks_into_as_it_runs_stays_what_it_is(inputs):
    network, x = Decodes().eval(), torch.randn(2, 3, 16, 16)
    model = convert(network, DA3Config(AdapterConfig(4, min_stride=1)), inputs, verify=False)
    assert {"encoder.stages.0", "encoder.stages.1"} < set(dict(model.plan.python))
    assert model.plan.head == "classifier"
    assert {"encoder.stages.0.conv", "encoder.stages.1.conv"} <= {h.name for h in model.plan.hosts}
    torch.testing.assert_close(model(x), network(x), rtol=1e-4, atol=1e-5)


def test_layers_that_may_be_the_head_are_named_as_the_user_names_them():
    layers = convert(Decodes().eval(), verify=False).plan.linear_layers
    assert set(layers) == {"encoder.stages.0.conv", "encoder.stages.1.conv", "classifier"}
