"""What a forward asks of its values is answered once, and checked."""

import dataclasses
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers.around import Around, input_gradient
from torch import nn
from torch.nn.utils import rnn

from lightning_da3 import AdapterConfig, ConversionWarning, DA3Config, InputError, convert

CONFIG = DA3Config(gate=None, adapter=AdapterConfig(hidden_channels=4, min_stride=1))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def assert_same(network, x, *, head="head", python=()):
    """The conversion computes the same, with and without gradients, and finds the head."""
    network = network.eval()
    model = convert(network, CONFIG, verify=False)
    assert model.plan.head == head
    assert [path for path, _ in model.plan.python] == list(python)
    want = network(x)
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
    return model


# --- decisions ------------------------------------------------------------------------------------


def by_rank(x):
    return x if x.ndim == 4 and len(x.shape) == 4 else x[None]


def by_channels(x):
    return x * 2 if x.shape[1] == 8 else x


def by_kind(x):
    return x if isinstance(x, torch.Tensor) else x[0]


def by_attribute(x):
    return x.tensors if hasattr(x, "tensors") else x


def over_channels(x):
    return torch.stack([x[:, i] * i for i in range(x.shape[1])], 1)


def by_type(x):
    return x if x.dtype == torch.float32 and not x.is_cuda else x.float()


def pads(x):
    rows = max(0, 8 - x.shape[2])
    return F.pad(x, (0, 0, 0, rows)) if rows > 0 else x


def ramp(x):
    return x + torch.arange(x.shape[-1], device=x.device, dtype=x.dtype) / x.shape[-1]


def pools(x):
    y = F.avg_pool2d(x, (x.size(2), x.size(3)))
    return x + F.adaptive_avg_pool2d(y, (x.shape[2] // 2, 1)).mean((2, 3), keepdim=True)


DECIDE = [pools, by_rank, by_channels, by_kind, by_attribute, over_channels, by_type, pads, ramp]


@pytest.mark.parametrize("function", DECIDE)
def test_what_a_forward_asks_of_values_is_answered(function):
    network = Around(function)
    model = assert_same(network, torch.randn(2, 3, 16, 16))
    for size in ((1, 3, 8, 8), (3, 3, 18, 14)):  # not what was traced
        x = torch.randn(size)
        torch.testing.assert_close(model(x), network(x), rtol=1e-4, atol=1e-5)


class Refuses(Around):
    def forward(self, x):
        if len(x) == 0:
            raise ValueError("no images")
        return super().forward(x.to(self.head.weight.dtype))


def test_a_network_that_refuses_an_input_refuses_it_itself():
    model = assert_same(Refuses(torch.relu), torch.randn(2, 3, 16, 16))
    with (
        pytest.warns(ConversionWarning, match=r"traced once more, .*\(`if len\(x\) == 0"),
        pytest.raises(ValueError, match="no images"),
    ):
        model(torch.empty(0, 3, 16, 16))


class Pools(Around):
    """It decides on the size of its input, and on an argument."""

    def forward(self, x, mask=None):
        if x.shape[-1] > 60:
            x = F.avg_pool2d(x, 2)
        if mask is not None:
            x = x * mask
        return super().forward(x)


MASK = torch.rand(1, 3, 1, 1, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("size", "given"), [(64, {}), (16, {"mask": MASK}), (64, {"mask": MASK})])
def test_a_network_is_traced_once_more_where_it_decides_otherwise(size, given):
    network = Pools(torch.relu).eval()
    model = convert(network, CONFIG, torch.randn(2, 3, 16, 16))
    model.add_domain("a", 2)
    model.set_domain("a")
    other, same = torch.randn(2, 3, size, size), torch.randn(2, 3, 16, 16)
    with model.disable_adapters():
        with pytest.warns(ConversionWarning, match="traced once more"):
            found = model(other, **given)
        torch.testing.assert_close(found, network(other, **given), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(other, **given), found)  # and says so once
        torch.testing.assert_close(model(same), network(same), rtol=1e-4, atol=1e-5)
    for x, more in ((other, given), (same, {})):  # the same adapters learn
        model(x, **more).square().sum().backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        assert trained
        assert all(p.grad is not None for p in trained)
        model.zero_grad()


def test_a_network_that_decides_in_many_ways_stays_python(monkeypatch):
    monkeypatch.setattr("lightning_da3.model.methods._MOST_WAYS", 2)

    class Many(Around):
        def forward(self, x):
            for most in range(100, 500, 100):
                if x.shape[-1] > most:
                    x = x * 1.1
            return super().forward(x)

    network = Many(torch.relu).eval()
    model = convert(network, CONFIG, torch.randn(2, 3, 16, 16))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConversionWarning)
        for size in range(50, 550, 100):
            x = torch.randn(1, 3, 8, size)
            torch.testing.assert_close(model(x), network(x), rtol=1e-4, atol=1e-5)
    (ways,) = model.methods.made.values()
    assert [bool(way.plan.python) for way in ways] == [False] * 2 + [True]


def test_a_model_that_was_saved_refuses_what_it_was_not_traced_for():
    model = convert(Pools(torch.relu).eval(), CONFIG, torch.randn(2, 3, 16, 16))
    again = pickle.loads(pickle.dumps(model))
    vars(again.original)["network"] = None  # as where its class cannot be pickled
    with pytest.raises(InputError, match=r"decides on its input's sizes .*shape\[-1\] > 60"):
        again(torch.randn(2, 3, 64, 64))


class Swallows(Around):
    def forward(self, x):
        x = self.body(self.stem(x))
        try:
            if x.sum() > 0:
                x = x * 2
        except TypeError:
            x = x * 3
        return self.head(x.mean((2, 3)))


def test_what_a_forward_catches_was_refused_all_the_same():
    network, x = Swallows(torch.relu).eval(), torch.randn(2, 3, 16, 16)
    model = convert(network, DA3Config(head=None), verify=False)
    assert "decides on the values" in dict(model.plan.python)[""]
    torch.testing.assert_close(model(x), network(x), rtol=1e-4, atol=1e-5)


class Odd(nn.Module):
    """It pads to an even size, as layers with windows do."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 2, 2)

    def forward(self, x):
        if x.shape[-1] % 2:
            x = F.pad(x, (0, 1, 0, 1))
        return self.conv(x)


def test_a_module_that_cannot_be_a_graph_is_a_node_of_its_parent():
    network = Around(Odd()).eval()
    model = convert(network, CONFIG, verify=False)
    assert model.plan.head == "head"
    assert [part.path for part in model.plan.parts] == ["", "function.conv"]
    assert "decides on the size of its input" in dict(model.plan.python)["function"]
    assert {host.name for host in model.plan.hosts} >= {"function.conv"}
    for side in (16, 18):
        x = torch.randn(2, 3, side, side)
        torch.testing.assert_close(model(x), network(x), rtol=1e-4, atol=1e-5)
        got, want = input_gradient(model, x), input_gradient(network, x)
        assert (got - want).norm() / want.norm() < 0.05


class Packs(nn.Module):
    """A classifier of sensors' signals, whose sequences are packed."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv1d(3, 8, 3, 2), nn.ReLU(), nn.Conv1d(8, 8, 3, 2))
        self.lstm, self.fc = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 5)

    def forward(self, x, lengths):
        x = self.conv(x).transpose(1, 2)
        packed = rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.fc(self.lstm(packed)[1][0][-1])


def test_packed_sequences_stay_python_for_a_plain_reason():
    network, inputs = Packs().eval(), (torch.randn(2, 3, 32), torch.tensor([5, 7]))
    model = convert(network, dataclasses.replace(CONFIG, head="fc"), inputs, verify=False)
    ((path, reason),) = model.plan.python
    assert path == ""
    assert "it packs sequences, whose lengths are values, so its LSTM and GRU keep" in reason
    assert "`packed = rnn.pack_padded_sequence(" in reason
    torch.testing.assert_close(model(*inputs), network(*inputs), rtol=1e-4, atol=1e-5)
    model.add_domain("a", num_classes=3)
    model.set_domain("a")
    model.train()(*inputs).sum().backward()
    assert all(p.grad is not None for p in model.domain("a").parameters())


class Divisible(nn.Module):
    """It refuses sizes that its strides do not divide, as networks of segmentation do."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1))
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x):
        if x.shape[-1] % 4 != 0 or x.shape[-2] % 4 != 0:
            raise RuntimeError(f"sizes must be multiples of 4, got {x.shape}")
        return F.interpolate(self.head(self.body(x)), size=x.shape[-2:], mode="bilinear")


@pytest.mark.parametrize("inputs", [None, torch.zeros(2, 3, 16, 16)])
def test_a_network_that_refuses_odd_sizes_is_one_graph_for_all_others(inputs):
    network = Divisible().eval()
    model = convert(network, CONFIG, inputs, verify=False)
    assert not model.plan.python
    for side in (16, 20):
        x = torch.randn(2, 3, side, side + 4)
        torch.testing.assert_close(model(x), network(x), rtol=1e-4, atol=1e-5)
    with (
        pytest.warns(ConversionWarning, match="traced once more"),
        pytest.raises(RuntimeError, match="multiples of 4"),
    ):
        model(torch.randn(2, 3, 18, 16))
