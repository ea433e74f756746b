"""What a converted network has of the user's network: attributes, submodules, methods."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers.lit import CONFIG
from torch import nn

from lightning_da3 import DA3Error, convert


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)


class Net(nn.Module):
    """Has what networks of libraries have beside `forward`."""

    def __init__(self):
        super().__init__()
        self.num_features, self._hidden = 8, "mine"
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.stages = nn.Sequential(Block(8), Block(8))
        self.fc = nn.Linear(8, 5)
        self.proj = nn.Linear(8, 6)  # `forward` does not use it

    def stem(self, x):
        return F.relu(self.bn1(self.conv1(x)))

    def forward_features(self, x, pool=False):
        x = self.stages(self.stem(x))
        return x.mean((2, 3)) if pool else x

    def forward_head(self, x):
        return self.fc(x.mean((2, 3)))

    def forward(self, x):
        return self.forward_head(self.forward_features(x))

    def encode(self, x, *, normalize=True):
        y = self.proj(self.forward_features(x, pool=True))
        return {"embedding": F.normalize(y, dim=-1) if normalize else y}

    def probabilities(self, x):
        return self(x).softmax(-1)

    def by_value(self, x):
        y = self.stem(x)
        return self.stages(y) if float(y.sum()) > 0 else y

    def by_size(self, x):
        return self.stem(x) if x.shape[-1] > 10 else self.conv1(x)

    def get_classifier(self):
        return self.fc

    @property
    def width(self):
        return self.conv1.out_channels


def trained_statistics_(net):
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return net.eval()


def original():
    torch.manual_seed(0)
    return trained_statistics_(Net())


def learned(model, name="a"):
    """A domain whose adapters do something."""
    model.add_domain(name, 2)
    for parameter in model.domain(name).parameters():
        nn.init.normal_(parameter, std=0.5)
    model.set_domain(name)
    return model


X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
Y = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(2))

CALLS = {
    "method": lambda net: net.forward_features(X),
    "with an option": lambda net: net.forward_features(X, pool=True),
    "by keyword": lambda net: net.forward_features(x=X),
    "of layers that forward does not use": lambda net: net.encode(X)["embedding"],
    "keyword option": lambda net: net.encode(X, normalize=False)["embedding"],
    "stage": lambda net: net.stages[1](Y),
    "stages by name": lambda net: net.stages(Y),
    "some stages": lambda net: net.stages[:2](Y),
    "layers one by one": lambda net: F.relu(net.bn1(net.conv1(X))),
    "a convolution without its norm": lambda net: net.conv1(X),
    "head": lambda net: net.fc(Y.mean((2, 3))),
    "forward inside": lambda net: net.probabilities(X),
    "decides by values": lambda net: net.by_value(X),
    "each stage": lambda net: [stage(Y) for stage in net.stages][-1],
    "network": lambda net: net(X),
}


@pytest.fixture(scope="module")
def plain():
    return convert(original(), CONFIG, verify=False)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_without_a_domain_every_call_gives_what_the_original_gives(call, plain):
    with torch.no_grad():
        expected = call(original())
    torch.testing.assert_close(call(plain.train()), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(call(plain.eval()), expected, rtol=1e-4, atol=1e-5)


def test_attributes_and_submodules_under_their_names(plain):
    assert (plain.num_features, plain._hidden, plain.width) == (8, "mine", 8)
    assert isinstance(plain.stages[0], Block)
    assert isinstance(plain.stages, nn.Sequential)
    assert len(plain.stages) == 2
    assert plain.conv1.out_channels == 8
    assert plain.get_classifier().weight is plain.backbone.get_submodule("fc").original.weight
    assert plain.stages[1].conv2.weight is plain.backbone.get_submodule("stages.1.conv2").weight
    torch.testing.assert_close(plain.bn1.running_var, original().bn1.running_var)
    for name in ("nothing_of_the_kind", "_nothing_either"):
        with pytest.raises(AttributeError, match=f"no attribute '{name}'"):
            getattr(plain, name)


def test_a_sequential_is_indexed_as_before():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten())
    model = convert(net, {**CONFIG.to_dict(), "head": None}, verify=False)
    assert len(model) == 4
    for ours, theirs in zip(model, net, strict=True):
        assert isinstance(ours, type(theirs))
    torch.testing.assert_close(model[0](X), net[0](X))
    assert bool(convert(original(), CONFIG, verify=False))


def test_a_method_is_traced_again_where_sizes_decide_otherwise(plain):
    for x in (X, X[..., :8, :8], X):
        with torch.no_grad():
            expected = original().by_size(x)
        torch.testing.assert_close(plain.by_size(x), expected, rtol=1e-4, atol=1e-5)


def test_a_pickled_model_has_them(plain):
    again = pickle.loads(pickle.dumps(plain))
    for name in ("method", "keyword option", "a convolution without its norm"):
        torch.testing.assert_close(CALLS[name](again), CALLS[name](plain))


# --- with a domain --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [True, False])
def test_methods_compute_with_the_adapters_of_forward(mode):
    model = learned(convert(original(), CONFIG, verify=False)).train(mode)
    with torch.no_grad():
        expected = model(X)
        features = model.forward_features(X)
        by_hand = model.stages[1](model.stages[0](model.stem(X)))
        torch.testing.assert_close(model.forward_head(features), expected)
        torch.testing.assert_close(model.fc(features.mean((2, 3))), expected)
        torch.testing.assert_close(by_hand, features)
        torch.testing.assert_close(model.probabilities(X), expected.softmax(-1))
        with model.disable_adapters():
            torch.testing.assert_close(model.forward_features(X), original().forward_features(X))
    assert not torch.allclose(features, original().forward_features(X), atol=1e-2)


def test_gradients_are_those_of_forward():
    model = learned(convert(original(), {**CONFIG.to_dict(), "memory": {"exact": True}})).train()
    found = []
    for call in (lambda: model(X), lambda: model.forward_head(model.forward_features(X))):
        model.progress, model.gate_loss_scale = 1.0, 1.0
        named = dict(model.domain("a").named_parameters())
        grads = torch.autograd.grad(call().square().sum(), [*named.values()])
        found.append(dict(zip(named, grads, strict=True)))
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-3, atol=1e-4)


def test_parameters_of_a_part_are_frozen_ones_and_the_active_domains():
    model = learned(convert(original(), CONFIG, verify=False))
    adapters = dict(model.domain("a").adapters.named_parameters())
    trained = [p for p in model.stages.parameters() if p.requires_grad]
    inside = {id(p) for name, p in adapters.items() if name.startswith("stages__")}
    assert {id(p) for p in trained} == inside != set()
    assert [*model.fc.parameters()] == [*model.domain("a").head.parameters()]
    assert model.fc.out_features == 2
    named = {id(p) for p in model.network.parameters() if p.requires_grad}
    assert named == {id(p) for p in model.parameters() if p.requires_grad}
    model.set_domain(None)
    assert not [p for p in model.network.parameters() if p.requires_grad]
    assert model.fc.out_features == 5


def test_a_part_of_a_host_refuses_to_run_without_its_adapter():
    model = learned(convert(original(), CONFIG, verify=False))
    with pytest.raises(DA3Error, match=r"'stages\.0\.conv2' without the rest .* the block"):
        model.stages[0].conv2(Y)
    with model.disable_adapters():
        model.stages[0].conv2(Y)


def test_views_are_read_only(plain):
    for edit in (
        lambda: setattr(plain.stages[0], "conv1", nn.Identity()),
        lambda: plain.stages[0].register_forward_hook(print),
        lambda: plain.stages.to("cpu"),
        lambda: plain.stages[0].load_state_dict({}),
        lambda: copy.deepcopy(plain.stages),
    ):
        with pytest.raises(DA3Error, match="converted network"):
            edit()
    plain.stages.eval()
    plain.stages.train()


def test_methods_follow_the_model(plain):
    """To another type, in a copy, and with other weights of the backbone."""
    model = copy.deepcopy(plain)
    model.forward_features(X), model.bn1(Y)
    double = model.double()
    expected = original().double().forward_features(X.double())
    torch.testing.assert_close(double.forward_features(X.double()), expected, rtol=1e-4, atol=1e-5)
    other = trained_statistics_(Net())
    again = copy.deepcopy(plain)
    again.load_state_dict(other.state_dict())
    for call in (CALLS["method"], CALLS["keyword option"], CALLS["a convolution without its norm"]):
        with torch.no_grad():
            torch.testing.assert_close(call(again), call(other), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain.forward_features(X), original().forward_features(X))


def test_they_are_no_part_of_states(plain):
    before = [*plain.state_dict()]
    plain.encode(X), plain.stages[0](Y)
    assert [*plain.state_dict()] == before
    assert not [m for m in plain.modules() if type(m).__name__ == "Block"]


# --- names that a DA3Model has itself -------------------------------------------------------------


class Configured(Net):
    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(num_labels=5, head="theirs")
        self.backbone = nn.Sequential(self.stages, nn.ReLU())

    def forward(self, x):
        return self.forward_head(self.backbone(self.stem(x)))


def test_names_that_both_have():
    model = convert(Configured(), CONFIG, verify=False)
    assert model.config.num_labels == model.network.config.num_labels == 5
    assert model.config == CONFIG == copy.deepcopy(model).config
    assert model.config.head == "auto"
    assert repr(model.config) == repr(CONFIG)
    assert hash(model.config) == hash(CONFIG)
    assert pickle.loads(pickle.dumps(model.config)).num_labels == 5
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = model.config.nothing
    model(X)
    with pytest.raises(DA3Error, match=r"`model\.network\.backbone`"):
        model.backbone(X)
    torch.testing.assert_close(model.network.backbone(Y), model.stages(Y).relu())


@pytest.mark.parametrize("part", [None, "stages", "conv1"])
def test_of_a_compiled_network(part):
    """Nothing is compiled here: `torch.compile` compiles when it is called."""
    net = original()
    if part is None:
        net = torch.compile(net)
    else:
        net.set_submodule(part, torch.compile(net.get_submodule(part)))
    model, plain = convert(net, CONFIG, verify=False), convert(original(), CONFIG, verify=False)
    assert model.fingerprint == plain.fingerprint
    assert model.architecture == plain.architecture
    assert model.plan == plain.plan
    assert [*model.state_dict()] == [*plain.state_dict()]
    assert [*model.original.spare] == [*plain.original.spare]
    assert [n for n, _ in model.network.named_modules()] == [
        n for n, _ in original().named_modules()
    ]
    with torch.no_grad():
        torch.testing.assert_close(model.encode(X), plain.encode(X))


def test_of_a_whole_compiled_network_verification_compiles_nothing():
    net = torch.compile(original(), backend=lambda *_: pytest.fail("compiled"))
    assert convert(net, CONFIG).plan.network == "Net"
