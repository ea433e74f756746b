"""Networks that no graph holds stay Python; nothing of the user's changes; when, how much."""

import os
import random
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.comparing import assert_relatively_close, photograph
from helpers.verified import CONFIG, EXACT, Net, assert_same, python_of
from torch import nn

from lightning_da3 import (
    ConfigError,
    ConversionWarning,
    convert,
)
from lightning_da3.converting import compared
from lightning_da3.tracing.watching import Snapshot
from lightning_da3.verifying.batches import Known
from lightning_da3.verifying.expected import Expected, expected_of
from lightning_da3.verifying.running import _BACKWARD, forward_only


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# --- networks that no graph holds -----------------------------------------------------------------


class Counter:
    """Something that tracing cannot see change."""

    __slots__ = ("calls",)

    def __init__(self):
        self.calls = 0

    def __deepcopy__(self, memo):
        copied = Counter()
        copied.calls = self.calls
        return copied


def counts(block, x):
    block.counter.calls += 1
    return x * block.counter.calls


def counting():
    net = Net(counts)
    net.b.counter = Counter()
    return net


@pytest.fixture
def _blind(monkeypatch):
    """Tracing does not see that attributes change."""
    monkeypatch.setattr(Snapshot, "changed", lambda *_: [])


@pytest.mark.usefixtures("_blind")
def test_a_count_of_calls():
    net, x = counting(), torch.randn(2, 3, 12, 12)
    paths, model = python_of(net, "b(, the network itself)? stays Python")
    assert "b" in paths
    assert not {"a", "c"} & set(paths)
    assert net.b.counter.calls == 0
    with torch.no_grad():
        first, second = model(x), model(x)
    assert not torch.allclose(first, second)


@pytest.mark.slow
def test_another_batch_shows_what_was_decided_once(monkeypatch):
    """A decision by the number of samples, that tracing took once and for all."""

    class Half(nn.Module):
        def forward(self, x):
            return x * (0.5 if type(x) is torch.Tensor and len(x) == 3 else 1.0)

    net = Net(lambda block, x: block.odd(x))
    net.b.odd = Half()
    with pytest.warns(ConversionWarning, match="eval, another batch"):
        model = convert(net, CONFIG)
    for count in (2, 3):
        assert_same(model, net, torch.randn(count, 3, 12, 12))


def test_the_gradient_of_a_users_function():
    class Reversed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1.0

        @staticmethod
        def backward(ctx, grad):
            return -grad

    net = Net(lambda block, x: Reversed.apply(x))
    with warnings.catch_warnings():  # it may as well be seen while tracing
        warnings.simplefilter("ignore", ConversionWarning)
        model = convert(net, CONFIG)
    x = torch.randn(2, 3, 12, 12, requires_grad=True)
    got, expected = (torch.autograd.grad(f(x).sum(), x)[0] for f in (model, net.eval()))
    assert (got - expected).norm() < 0.05 * expected.norm()


def test_what_is_drawn_in_eval_is_drawn_in_both():
    net = Net(lambda block, x: F.dropout(x, 0.4, training=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(net, CONFIG)


def test_what_was_drawn_once_is_found():
    net = Net(lambda block, x: x * (1 + torch.rand(4, 1, 1, dtype=x.dtype)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConversionWarning)
        model = convert(net, CONFIG)
    x = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        assert not torch.allclose(model(x), model(x))


# --- what is left alone ---------------------------------------------------------------------------


def test_generators_go_on_where_they_were():
    def draws(block, x):
        return x + random.random() + np.random.rand() + torch.rand(())  # noqa: NPY002

    torch.manual_seed(3), random.seed(3), np.random.seed(3)  # noqa: NPY002
    expected = torch.rand(2), random.random(), np.random.rand()  # noqa: NPY002
    net = Net(draws)
    torch.manual_seed(3), random.seed(3), np.random.seed(3)  # noqa: NPY002
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConversionWarning)
        convert(net, CONFIG)
    got = torch.rand(2), random.random(), np.random.rand()  # noqa: NPY002
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("training", [True, False])
def test_the_users_network_is_left_alone(training):
    def remembers(block, x):
        block.seen = x.detach()
        return x

    net = Net(remembers).train(training)
    before = photograph(net)
    model = convert(net, CONFIG, example_inputs=torch.randn(4, 3, 12, 12))
    assert photograph(net) == before
    assert model.training is training
    assert not any(p.grad is not None for p in net.parameters())


class WithBackbone(nn.Module):
    """Its part has a name that a DA3Model has, too, and refuses to call directly."""

    def __init__(self):
        super().__init__()
        self.backbone = Net()

    def forward(self, x):
        return self.backbone(x)


def test_a_copy_is_compared_and_not_what_it_was_copied_from():
    model = convert(WithBackbone(), CONFIG, torch.randn(2, 3, 12, 12))
    assert not model.plan.python


class Leaves(nn.Module):
    """Keeps its last results in lists, as torchvision's RAFT keeps its pyramid."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc, self.last = nn.Conv2d(3, 8, 3, 2), nn.Linear(8, 3), []

    def forward(self, x):
        maps = self.conv(x).relu()
        self.last = [maps, {"mean": maps.mean((2, 3))}]
        return self.fc(self.last[1]["mean"])


def test_results_that_a_forward_left_in_lists_are_copied():
    network, x = Leaves().eval(), torch.randn(2, 3, 8, 8)
    expected = network(x)
    model = convert(network, CONFIG, x)
    assert_relatively_close([model(x)], [expected], 1e-5)
    assert_relatively_close([convert(network, EXACT)(x)], [expected], 1e-5)
    assert network.last[0].grad_fn is not None


def test_examples_that_the_network_would_write_into_stay_as_they_are():
    class Normalizes(Net):
        def forward(self, x):
            return super().forward(x.sub_(0.5))

    x = torch.randn(2, 3, 12, 12)
    before = x.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConversionWarning)
        convert(Normalizes(), CONFIG, example_inputs=x)
    torch.testing.assert_close(x, before, rtol=0, atol=0)


# --- when and how much ----------------------------------------------------------------------------


def test_unknown_inputs_are_an_error_only_if_asked_for():
    class Two(Net):
        def forward(self, image, scale):
            return super().forward(image) * scale["by"]

    convert(Two(), CONFIG)
    with pytest.raises(ConfigError, match=r"What Two takes is not known.*Give `example_inputs`"):
        convert(Two(), CONFIG, verify=True)
    examples = (torch.randn(2, 3, 12, 12), {"by": torch.ones(2, 1)})
    net = Two().eval()
    model = convert(net, CONFIG, examples, verify=True)
    assert_relatively_close(model(*examples), net(*examples), 1e-4)


def test_large_networks_are_compared_briefly(monkeypatch):
    net, known = Net(), Known((torch.randn(4, 3, 12, 12),))
    found = expected_of(net, known, thorough=None)
    assert isinstance(found, Expected)
    assert (len(found.passes), found.dtype) == (5, torch.double)
    monkeypatch.setattr("lightning_da3.verifying.expected.THOROUGH_FLOPS", 1e3)
    found = expected_of(net, known, thorough=None)
    assert ([c.gradients for c, _ in found.passes], found.dtype) == ([False, True], None)
    assert len(found.passes[0][0].inputs[0]) == 1
    monkeypatch.setattr("lightning_da3.verifying.expected.GRADIENT_FLOPS", 1e3)
    assert len(expected_of(net, known, thorough=None).passes) == 1
    monkeypatch.setattr("lightning_da3.verifying.expected.MOST_FLOPS", 1e3)
    assert expected_of(net, known, thorough=None) is None
    assert len(expected_of(net, known, thorough=True).passes) == 5


@pytest.mark.usefixtures("_blind")
@pytest.mark.slow
def test_a_brief_difference_is_compared_again_thoroughly(monkeypatch):
    monkeypatch.setattr("lightning_da3.verifying.expected.THOROUGH_FLOPS", 1e3)
    with pytest.warns(ConversionWarning, match="eval, again"):
        convert(counting(), CONFIG, example_inputs=torch.randn(2, 3, 12, 12))


def test_a_network_whose_code_names_a_type_is_compared_in_that_type():
    class Float(Net):
        def forward(self, x):
            return super().forward(x.float())

    net = Float()
    found = expected_of(net, Known((torch.randn(2, 3, 12, 12),)), thorough=True)
    assert found.dtype is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(net, CONFIG, verify=True)


@pytest.mark.parametrize("config", [CONFIG, EXACT], ids=["codes", "exact"])
def test_tokens_are_compared_by_the_gradients_of_their_embeddings(config):
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.norm = nn.Embedding(11, 8), nn.LayerNorm(8)
            self.up, self.down, self.fc = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 3)

        def forward(self, ids):
            x = self.embed(ids)
            return self.fc((x + self.down(F.gelu(self.up(self.norm(x))))).mean(1))

    _, found = compared(Tokens(), config)
    assert all(c.ok for c in found)
    gradients = [c for c in found if c.name.startswith("gradients")]
    assert len(gradients) == 2
    assert config is EXACT or all(c.difference > 0 for c in gradients)  # compared, indeed


def test_every_comparison_says_what_and_how_far():
    _, found = compared(Net(), EXACT)
    names = [c.name for c in found]
    assert [n.split(",")[0] for n in names].count("outputs") == 5
    assert any("train mode" in n for n in names)
    assert all("at most" in str(c) for c in found)


def test_the_package_does_not_write_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    convert(Net(), CONFIG, verify=True)
    assert list(Path().iterdir()) == []


# --- what it leaves to processes ------------------------------------------------------------------

FORK = """
import os, sys
import torch
from helpers.verified import CONFIG, Net
from lightning_da3 import convert
from lightning_da3.verifying.running import forward_only

with forward_only() if torch.accelerator.is_available() else torch.enable_grad():
    convert(Net(), CONFIG, torch.randn(2, 3, 12, 12))
child = os.fork()
if not child:
    torch.ones(3, requires_grad=True).sum().backward()
    os._exit(7)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 7)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.slow
def test_processes_forked_later_can_compute_gradients():
    tests = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", FORK], cwd=tests, check=True, timeout=200)


def test_gradients_are_not_compared_before_a_fork(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("a backward pass")

    monkeypatch.setattr(torch.autograd, "grad", never)
    with forward_only():
        convert(Net(), CONFIG, torch.randn(2, 3, 12, 12))
    assert _BACKWARD.get()
