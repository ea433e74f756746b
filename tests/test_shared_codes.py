"""An adapter whose cells are single positions keeps nothing of an activation that keeps codes."""

import copy
import pickle
from functools import partial

import pytest
import torch
from helpers.comparing import (
    add,
    assert_gradients_close,
    assert_identical,
    assert_relatively_close,
    gradients,
    mix_gates_,
    score,
)
from torch import nn

from lightning_da3 import AdapterConfig, DA3Config, GateConfig, MemoryConfig, convert
from lightning_da3.memory import SavedActivations, StepPredictor, saved_activation_bytes
from lightning_da3.nn.shared_codes import CodesWanted

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
POOLS = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}
SILU = "backbone.2.3"  # read by one host, 3.0, directly


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def network(activation=nn.SiLU, channels=32, axes=2, blocks=3):
    """Blocks that begin with a host, which reads the activation at the end of the last one."""
    conv = CONVS[axes]

    def block():
        wide, narrow = conv(channels, channels, 3, 1, 1), conv(channels, channels, 1)
        return nn.Sequential(wide, activation(), narrow, activation())

    first = conv(3, channels, 3, 2, 1), nn.ReLU()
    last = POOLS[axes](1), nn.Flatten(), nn.Linear(channels, 3)
    return nn.Sequential(*first, *[block() for _ in range(blocks)], *last)


def images(count=4, side=10, axes=2):
    return torch.randn(count, 3, *[side] * axes)


def converted(net, x, gate=True, **memory):
    """With a domain that has learned something, and gates partly closed."""
    adapter = AdapterConfig(hidden_channels=4, min_stride=1, min_depth=0)
    gate = GateConfig(0.5, by="cell") if gate else None
    config = DA3Config(adapter, gate, MemoryConfig(**memory))
    model = add(convert(net.eval(), config), "a")
    model.set_domain("a")
    if gate:
        mix_gates_(model, (x,))
    return model.train()


def saved(model, x):
    with SavedActivations(model, inputs=(x,)) as found:
        output = model(x)
    del output  # the graph lived until here
    return found


def apart(monkeypatch):
    """From here on, adapters and activations keep codes of their own."""
    monkeypatch.setattr(CodesWanted, "forward", lambda *_: None)


# --- what is kept


def test_a_twelfth_of_fine_tuning_is_kept():
    """Six blocks of two activations on maps of 5x5 pixels, behind frozen layers."""
    layers = [nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU()]
    layers += [nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, 2, 1), nn.ReLU()]
    blocks = [m for _ in range(6) for m in [*network()[2]]]
    net = nn.Sequential(*layers, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4))
    x = torch.randn(4, 3, 40, 40)
    full = saved_activation_bytes(copy.deepcopy(net).train(), x)
    model = add(convert(net.eval()), "d")
    model.set_domain("d")
    assert saved_activation_bytes(model.train(), x) * 12 < full


def test_bytes_by_hand(monkeypatch):
    x = images()
    model = converted(network(), x)
    together = saved(model, x)
    apart(monkeypatch)
    alone = saved(model, x)
    n = 4 * 32 * 25
    both = {
        SILU: (n + 4 * 4 * 8, n),  # a range for 200 elements; none for derivatives
        "bank.a.adapters.3__0": (0, n + 4 * 16 * 8),  # a range for 50
    }
    for name, (one, other) in both.items():
        rest = alone.by_module[name] - other
        assert together.by_module[name] == one + rest
    assert together.by_module["backbone.4.3"] == alone.by_module["backbone.4.3"]  # no host reads it
    assert alone.bytes - together.bytes == 2 * (n + 64 * 8 - 16 * 8)


@pytest.mark.parametrize("weights", ["same", "bfloat16"])
def test_the_prediction_is_what_is_kept(weights):
    x = images(2)
    model = converted(network(), x, weights=weights)
    predicted = StepPredictor(model)(x).saved_activation_bytes
    assert 0 <= predicted - saved(model, x).bytes < 64  # the loss


def test_where_no_adapter_keeps_every_position_the_activation_keeps_its_own():
    x = images(side=20)  # cells of several pixels
    model = converted(network(), x)
    assert [host.codes_from for host in model.plan.hosts] == [None, None, "_2_3", "_3_3"]
    assert saved(model, x).by_module[SILU] == 4 * 32 * 100
    model.set_domain(None)
    x = images().requires_grad_()
    assert saved(model, x).by_module[SILU] == 4 * 32 * 25


def test_exact_mode_keeps_no_codes():
    model = converted(network(), images(), exact=True)
    assert not any(host.codes_from for host in model.plan.hosts)
    assert not [m for m in model.modules() if isinstance(m, CodesWanted)]


def test_mixed_domains():
    x = images()
    model = add(converted(network(), x), "b").eval()
    mixed = model(x, domains=["a", "b", "a", "b"])
    for name, rows in (("a", [0, 2]), ("b", [1, 3])):
        model.set_domain(name)
        alone = model(x[rows])
        for row, expected in zip(rows, alone, strict=True):
            torch.testing.assert_close(mixed[row], expected, rtol=1e-4, atol=1e-5)


# --- gradients


ACTIVATIONS = [nn.SiLU, nn.GELU, nn.Mish, nn.ELU, nn.Sigmoid, nn.Tanh, nn.Softplus]
ACTIVATIONS.append(partial(nn.SiLU, inplace=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_outputs_are_the_same_and_gradients_close(activation, monkeypatch):
    model = converted(network(activation), images())
    x = images()
    assert model.plan.hosts[-1].codes_from == "_3_3"
    output, got = model(x), gradients(model, (x,))
    torch.manual_seed(0)
    exact = converted(network(activation), images(), exact=True)
    apart(monkeypatch)
    assert_identical(output, model(x))
    want = gradients(exact, (x,))
    assert_gradients_close(got, want, 0.02)
    assert_gradients_close(gradients(model, (x,)), want, 0.02)


@pytest.mark.parametrize("axes", [1, 3])
def test_other_axes(axes, monkeypatch):
    x = images(2, 6, axes)
    model = converted(network(channels=16, axes=axes), x)
    together, got = saved(model, x), gradients(model, (x,))
    apart(monkeypatch)
    assert together.bytes < saved(model, x).bytes
    assert_gradients_close(got, gradients(model, (x,)), 0.02)


@pytest.mark.parametrize("count", [0, 1])
def test_small_batches(count):
    model = converted(network(), images())
    got = gradients(model, (images(count),))
    assert all(gradient.isfinite().all() for gradient in got)
    assert bool(count) == any(gradient.any() for gradient in got)


@pytest.mark.parametrize("kind", ["autocast", "bfloat16", "channels_last"])
def test_types_and_layouts(kind, monkeypatch):
    x = images()
    if kind == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    model = converted(network(), x)
    if kind == "bfloat16":
        model, x = model.bfloat16(), x.bfloat16()

    def lowered():
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            output = model(x)
        return gradients(model, (x,), output.float())

    got, kept = lowered(), saved(model, x).bytes
    apart(monkeypatch)
    assert kept < saved(model, x).bytes
    assert_gradients_close(got, lowered(), 0.02 if kind == "channels_last" else 0.1)


def test_a_batch_in_parts_has_the_gradients_of_the_whole():
    x = images()
    model, x = converted(network(), x, gate=False).double(), x.double()
    trained = [p for p in model.parameters() if p.requires_grad]

    def gradient(part):
        return torch.autograd.grad(model(part).square().sum(), trained)

    parts = [gradient(part) for part in x.split(1)]
    summed = [sum(grads) for grads in zip(*parts, strict=True)]
    assert_relatively_close(summed, gradient(x), 1e-9)


def test_a_second_backward_through_a_retained_graph():
    x = images()
    model = converted(network(), x)
    loss = score(model(x))
    trained = [p for p in model.parameters() if p.requires_grad]
    first = torch.autograd.grad(loss, trained, retain_graph=True)
    assert_identical(torch.autograd.grad(loss, trained), first)


# --- who else has a hand in it


def doubled(_module, _args, output):
    return output * 2.0


def written(_module, _args, output):
    output.mul_(2.0)


def before(_module, args):
    return (args[0] * 2.0,)


@pytest.mark.parametrize("hook", [doubled, written, before])
def test_hooks_that_change_what_the_adapter_reads(hook, monkeypatch):
    x = images()
    model = converted(network(), x)
    layer = model.get_submodule(SILU)
    if hook is before:
        layer.register_forward_pre_hook(hook)
    else:
        layer.register_forward_hook(hook)
    got = gradients(model, (x,))
    apart(monkeypatch)
    assert_gradients_close(got, gradients(model, (x,)), 0.02)


def test_hooks_that_look_on_change_nothing_and_see_one_tensor():
    x = images()
    model = converted(network(), x)
    kept, seen = saved(model, x).bytes, []
    layer = model.get_submodule(SILU)
    layer.register_forward_hook(lambda _, args, output: seen.append((*args, output)))
    assert saved(model, x).bytes == kept
    assert [type(value) for value in seen[0]] == [torch.Tensor] * 2


@pytest.mark.parametrize("how", ["copied", "pickled"])
def test_copies_share_codes_of_their_own(how):
    x = images()
    model = converted(network(), x)
    kept, want = saved(model, x).bytes, gradients(model, (x,))
    other = copy.deepcopy(model) if how == "copied" else pickle.loads(pickle.dumps(model))
    model.set_domain(None)
    assert saved(other, x).bytes == kept
    assert_identical(gradients(other, (x,)), want)


class Two(nn.Module):
    """Two hosts, and a sum, read one value; another host reads it behind a dropout."""

    def __init__(self, change=None):
        super().__init__()
        self.first, self.act, self.change = nn.Conv2d(3, 16, 3, 2, 1), nn.SiLU(), change
        self.one, self.two = nn.Conv2d(16, 16, 3, 1, 1), nn.Conv2d(16, 16, 3, 1, 1)
        self.three, self.drop = nn.Conv2d(16, 16, 3, 1, 1), nn.Dropout(0.5)
        self.fc = nn.Linear(16, 3)

    def forward(self, x):
        x = self.act(self.first(x) * 1.0)
        if self.change is not None:
            self.change(x)
        y = self.one(x) + self.two(x) * self.three(self.drop(x)) + x
        return self.fc(y.mean((2, 3)))


def test_several_hosts_share_with_one_activation(monkeypatch):
    x = images().requires_grad_()  # so that the activation keeps something
    model = converted(Two(), x)
    assert [host.codes_from for host in model.plan.hosts] == [None, "act", "act", "act"]
    together, got = saved(model, x).bytes, gradients(model, (x,))
    apart(monkeypatch)
    assert saved(model, x).bytes - together == 3 * (1600 + 32 * 8) - 8 * 8
    assert_gradients_close(got, gradients(model, (x,)), 0.02)


@pytest.mark.parametrize(
    "net",
    [
        *map(network, (nn.ReLU, nn.Hardswish, nn.SELU, nn.Softsign, lambda: nn.ELU(0.5))),
        Two(lambda x: x.mul_(2.0)),
    ],
    ids=["relu", "hardswish", "selu", "softsign", "elu of 0.5", "in place"],
)
def test_values_that_follow_from_no_codes(net):
    model = convert(net.eval(), DA3Config(AdapterConfig(min_stride=1, min_depth=0)))
    assert model.plan.hosts
    assert not any(host.codes_from for host in model.plan.hosts)


def test_the_plan_says_whose_codes_are_read():
    model = convert(network().eval(), DA3Config(AdapterConfig(min_stride=1, min_depth=0)))
    assert "reads 3.0 from the codes of 2.3," in str(model.plan)


# --- programs


@pytest.mark.filterwarnings("ignore")  # of the compiler about itself
@pytest.mark.slow
def test_compiled():
    torch._dynamo.reset()
    x = images()
    model = converted(network(), x)
    want, kept = gradients(model, (x,)), saved(model, x).bytes
    compiled = torch.compile(model, backend="aot_eager_decomp_partition", fullgraph=True)
    assert_relatively_close(gradients(compiled, (x,)), want, 1e-3)
    assert saved_activation_bytes(compiled, x) <= kept


@pytest.mark.slow
def test_an_exported_training_step(tmp_path):
    x = images(2)
    model = converted(network(channels=8, blocks=2), x, gate=False)
    assert model.plan.hosts[-1].codes_from == "_2_3"
    path = model.export_training("a", tmp_path / "a.pt2", x, optimizer="sgd", format="pt2")
    step = torch.export.load(path).module()
    own = dict(model.domain("a").named_parameters())
    y = torch.tensor([0, 2])
    new = step(x, y, *[p.detach() for p in own.values()], torch.tensor(1.0))
    grads = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), list(own.values()))
    moved = [p.detach() - n for p, n in zip(own.values(), new[1:], strict=True)]
    assert_gradients_close(moved, grads, 1e-3)
