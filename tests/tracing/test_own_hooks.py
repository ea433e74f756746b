"""Hooks that a forward hangs on its own modules as it runs are a part of what it computes."""

import contextvars
import copy
import functools

import pytest
import torch
from helpers.around import input_gradient
from torch import nn

from lightning_da3 import AdapterConfig, DA3Config, MemoryConfig, convert
from lightning_da3.tracing.islands import trace

CONFIG = DA3Config(
    gate=None, adapter=AdapterConfig(4, min_stride=1), memory=MemoryConfig(exact=True)
)
X = torch.zeros(2, 3, 16, 16)
COLLECTED = contextvars.ContextVar("collected", default=None)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def capturing(forward):
    """Collect what stages give, by hooks that the first call hangs on them."""

    @functools.wraps(forward)
    def wrapper(self, *args, **kwargs):
        if not getattr(self, "_hooked", False):
            for stage in self.hooked():
                stage.register_forward_hook(collect)
            self._hooked = True
        collected = []
        token = COLLECTED.set(collected)
        try:
            y = forward(self, *args, **kwargs)
        finally:
            COLLECTED.reset(token)
        return self.result(y, collected)

    return wrapper


def collect(module, args, y):
    del module
    collected = COLLECTED.get()
    if collected is not None:
        if not collected:
            collected.append(args[0])
        collected.append(y)


class Stage(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv, self.act = nn.Conv2d(channels, 8, 3, 2, 1), nn.ReLU()

    def forward(self, x):
        return self.act(self.conv(x))


class Decides(Stage):
    """Stays Python."""

    def forward(self, x):
        x = super().forward(x)
        return x * 2 if x.sum() > 0 else x


class Captures(nn.Module):
    def __init__(self, kind=Stage):
        super().__init__()
        self.stages = nn.ModuleList([Stage(3), kind(8), Stage(8)])
        self.classifier = nn.Linear(8, 5)

    def hooked(self):
        return self.stages

    @capturing
    def forward(self, x):
        for stage in self.stages:
            x = stage(x)
        return self.classifier(x.mean((2, 3)))

    def result(self, y, collected):
        return y + sum(z.mean() for z in collected)


class CapturesLayers(Captures):
    def hooked(self):
        return [stage.conv for stage in self.stages]


class ReadsNone(Captures):
    def result(self, y, collected):
        assert len(collected) == 4
        return y


class AroundCaptures(nn.Module):
    """Stays Python, and the hooks are hung inside."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) if x.sum() > -1e9 else x


def hooks(network):
    return {
        (path, name): dict(held)
        for path, module in network.named_modules()
        for name, held in vars(module).items()
        if "_hooks" in name and isinstance(held, dict)
    }


def assert_converts(network, python=()):
    """It computes what it did, with the gradients, and is left as it was, hooks and all."""
    x, before = torch.randn(2, 3, 16, 16), hooks(network)
    original, notes = copy.deepcopy(network), hasattr(network, "_hooked")
    model = convert(network, CONFIG, X, verify=False)
    assert set(dict(model.plan.python)) == set(python)
    assert hooks(network) == before
    assert hasattr(network, "_hooked") is notes
    for _ in range(2):  # the original hooks into itself once
        torch.testing.assert_close(model(x), original(x), rtol=1e-4, atol=1e-5)
    got, want = input_gradient(model, x), input_gradient(original, x)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)
    return model


@pytest.mark.parametrize("kind", [Captures, CapturesLayers, ReadsNone])
def test_what_hooks_collect_is_in_the_graph(kind):
    model = assert_converts(kind().eval())
    assert len(model.plan.hosts) == 3


def test_what_nobody_reads_is_not_in_the_graph():
    def count(kind):
        return len(trace(kind().eval(), [X]).root.graph.nodes)

    assert count(ReadsNone) < count(Captures)


def test_hooks_run_around_what_stays_python():
    assert_converts(Captures(Decides).eval(), python=["stages.1"])


def test_hooks_that_are_hung_inside_of_what_stays_python():
    assert_converts(AroundCaptures(Captures()).eval(), python=[""])


def test_hooks_that_are_hung_on_what_is_inside_of_what_stays_python():
    class Holds(nn.Module):
        def __init__(self):
            super().__init__()
            self.stage = Stage(8)

        def forward(self, x):
            return self.stage(x) if x.sum() > -1e9 else x

    class Deep(Captures):
        def __init__(self):
            super().__init__()
            self.stages[1] = Holds()

        def hooked(self):
            return [self.stages[0], self.stages[1].stage]

    model = assert_converts(Deep().eval(), python=["", "stages.0", "stages.1", "stages.1.stage"])
    assert "one node" in dict(model.plan.python)[""]


class ForOneCall(Captures):
    """Hangs its hooks in every call, and takes them off."""

    def forward(self, x):
        seen = []

        def double(module, args):
            del module
            return (args[0] * 2,)

        def add(module, args, kwargs, y):
            del module, args, kwargs
            seen.append(y)
            return y + 1

        handles = [
            self.stages[0].register_forward_pre_hook(double),
            self.stages[1].register_forward_hook(add, with_kwargs=True),
            self.stages[2].conv.register_forward_hook(lambda m, args, y: y * 3),
        ]
        try:
            for stage in self.stages:
                x = stage(x)
        finally:
            for handle in handles:
                handle.remove()
        return self.classifier(x.mean((2, 3))) + seen[0].mean()


def test_hooks_of_one_call_change_what_they_change():
    assert_converts(ForOneCall().eval())


class TakesItselfOff(Captures):
    def forward(self, x):
        def once(module, args, y):
            del module, args
            handle.remove()
            return y * 2

        handle = self.stages[1].conv.register_forward_hook(once)
        for stage in (*self.stages, self.stages[1]):
            x = stage(x)
        return self.classifier(x.mean((2, 3)))


def test_a_hook_that_takes_itself_off_runs_once():
    assert_converts(TakesItselfOff().eval())


class MoreEveryTime(Captures):
    def forward(self, x):
        self.stages[1].register_forward_hook(lambda m, args, y: y * 1.5)
        for stage in self.stages:
            x = stage(x)
        return self.classifier(x.mean((2, 3)))


class OtherwiseAtFirst(Captures):
    def forward(self, x):
        first = not getattr(self, "_called", False)
        self._called = True
        for stage in self.stages:
            x = stage(x)
        y = self.classifier(x.mean((2, 3)))
        return y + 1 if first else y


@pytest.mark.parametrize("kind", [MoreEveryTime, OtherwiseAtFirst])
def test_what_later_calls_do_otherwise_stays_python(kind):
    network, x = kind().eval(), torch.randn(2, 3, 16, 16)
    model = convert(network, CONFIG, X, verify=False)
    assert "" in dict(model.plan.python)
    for _ in range(3):
        torch.testing.assert_close(model(x), network(x), rtol=1e-4, atol=1e-5)


def test_what_counts_its_calls_stays_python_alone():
    class Counts(Stage):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    network = Captures(Counts).eval()
    assert_converts(network, python=["stages.1"])


# --- beside hooks that were there before ----------------------------------------------------------


@pytest.mark.parametrize("where", ["stages.1", "stages.1.conv", "stages.0.act", ""])
def test_hooks_of_the_user_run_once_a_call_beside_them(where):
    network, calls = Captures().eval(), []

    def noted(module, args, y):
        del module, args
        calls.append(y.requires_grad)
        return y * 2

    network.get_submodule(where).register_forward_hook(noted)
    x = torch.randn(2, 3, 16, 16)
    model = convert(network, CONFIG, X, verify=False)
    assert not model.plan.python
    calls.clear()
    want = network(x)
    assert len(calls) == 1
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
    assert len(calls) == 2
    model(x.requires_grad_()).sum().backward()
    assert len(calls) == 3
    assert calls[-1]


def test_hooks_that_would_have_to_run_between_the_users_stay_python():
    class First(Captures):
        def forward(self, x):
            hook = self.stages[1].register_forward_pre_hook(lambda m, args: (args[0] + 1,))
            for stage in self.stages:
                x = stage(x)
            hook.remove()
            return self.classifier(x.mean((2, 3)))

    network, x = First().eval(), torch.randn(2, 3, 16, 16)
    network.stages[1].register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    model = convert(network, CONFIG, X, verify=False)
    assert "hooks which were there before" in dict(model.plan.python)[""]
    torch.testing.assert_close(model(x), network(x), rtol=1e-4, atol=1e-5)
