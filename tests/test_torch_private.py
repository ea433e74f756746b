"""What stands in the place of private parts of PyTorch does what they do."""

import contextlib
import pkgutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers.missing import without_private_parts
from helpers.ops import leaf, randn
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from lightning_da3.errors import DA3Error
from lightning_da3.memory.measured import _highest_sum
from lightning_da3.torch_private import autograd, fake, kernels, modules, profiling
from lightning_da3.torch_private.finding import found, missing, needed


@pytest.fixture
def without(monkeypatch):
    return lambda name: without_private_parts(name, monkeypatch)


def same(one, other):
    for a, b in zip(one, other, strict=True):
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_parts_are_found_or_replaced():
    assert found("torch:Tensor.relu", None) is torch.Tensor.relu
    assert found("torch:Tensor.none_such", 3) == found("torch.none_such:x", 3) == 3
    assert found("torch:ops.aten.none_such", 3) == found("torch:ops.none_such.mm", 3) == 3
    assert needed("torch:Tensor.relu", "a test") is torch.Tensor.relu


def test_what_nothing_replaces_says_so_when_it_is_used():
    absent = missing("torch:Tensor._gone", "a test")
    with pytest.raises(DA3Error, match=r"has no `torch\.Tensor\._gone`, which a test needs\. Ins"):
        absent(1, key=2)
    with pytest.raises(DA3Error, match="which a test needs"):
        type("Mode", (absent,), {})()
    assert not isinstance(3, absent)
    with contextlib.suppress(ValueError, absent):
        raise ValueError("another")


def test_checkpoints_are_known(without):
    def seen(x):
        found.append((autograd.is_checkpointed(), by_frames.is_checkpointed()))
        return x * 2

    found, by_frames = [], without("torch_private.autograd")
    x = leaf(randn(3))
    checkpoint(seen, x, use_reentrant=False)
    seen(x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        seen(x)
    assert found == [(True, True), (False, False), (False, False)]


# --- kernels

X, GRAD = randn(2, 3, 4, 4) * 3, randn(2, 3, 4, 4, seed=1)
ELEMENTWISE = {
    "silu_backward": (),
    "hardswish_backward": (),
    "mish_backward": (),
    "sigmoid_backward": (),
    "tanh_backward": (),
    "softplus_backward": (3.0, 2.0),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_kernels(name, without):
    arguments = (GRAD, X, *ELEMENTWISE[name])
    mine, theirs = getattr(without("torch_private.kernels"), name), getattr(kernels, name)
    assert mine is not theirs
    same([mine(*arguments)], [theirs(*arguments)])


def test_kernels_with_options(without):
    copy = without("torch_private.kernels")
    for approximate in ("none", "tanh"):
        mine = copy.gelu_backward(GRAD, X, approximate=approximate)
        same([mine], [kernels.gelu_backward(GRAD, X, approximate=approximate)])
    for options in ((1.0, 1.0, 1.0), (1.67, 1.05, 1.0), (-0.7, 1.0, 1.0), (0.3, 1.0, 1 / 0.3)):
        mine = copy.elu_backward(GRAD, *options, False, X)
        same([mine], [kernels.elu_backward(GRAD, *options, False, X)])


def pooled(axes):
    x = randn(2, 3, *[6] * axes)
    window = ([3] * axes, [2] * axes, [1] * axes)
    return x, window, 3


@pytest.mark.parametrize("axes", [2, 3])
def test_kernels_of_pools(axes, without):
    copy = without("torch_private.kernels")
    x, window, side = pooled(axes)
    grad = randn(2, 3, *[side] * axes, seed=1)
    plain = {2: F.max_pool2d, 3: F.max_pool3d}[axes]
    _, index = plain(x, *window, return_indices=True)
    calls = {
        "MAX_POOL_BACKWARD": (grad, x, *window, [1] * axes, False, index),
        "AVG_POOL_BACKWARD": (grad, x, *window, False, True, None),
        "ADAPTIVE_AVG_POOL_BACKWARD": (randn(2, 3, *[4] * axes, seed=1), x),
    }
    for name, arguments in calls.items():
        mine, theirs = getattr(copy, name)[axes], getattr(kernels, name)[axes]
        assert mine is not theirs
        same([mine(*arguments)], [theirs(*arguments)])


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_kernels_of_resampling(axes, without):
    copy = without("torch_private.kernels")
    size, out = [2, 3, *[3] * axes], [5] * axes
    grad = randn(2, 3, *out)
    backward = kernels.UPSAMPLE_NEAREST_BACKWARD[axes]
    same([copy.UPSAMPLE_NEAREST_BACKWARD[axes](grad, out, size)], [backward(grad, out, size)])
    if axes > 1:
        grid = randn(2, *out, axes, seed=2)
        for padding, align in ((0, False), (1, True)):
            arguments = (grad, randn(*size), grid, 0, padding, align, [True, False])
            mine = copy.GRID_SAMPLE_BACKWARD[axes](*arguments)[0]
            same([mine], [kernels.GRID_SAMPLE_BACKWARD[axes](*arguments)[0]])


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True), (False, False)])
def test_the_kernel_of_convolutions(wanted, without):
    x, weight, grad = randn(2, 3, 6, 5), randn(4, 3, 3, 1, seed=1), randn(2, 4, 6, 5, seed=2)
    how = ([1, 1], [1, 0], [1, 1], False, [0, 0], 1, [*wanted, False])
    mine = without("torch_private.kernels").convolution_backward(grad, x, weight, None, *how)
    assert [g is not None for g in mine] == [*wanted, False]
    same(mine, kernels.convolution_backward(grad, x, weight, None, *how))


@pytest.mark.parametrize("groups", [1, 3])
def test_the_kernel_of_group_norms(groups, without):
    x, grad, scale = randn(2, 6, 4, 3), randn(2, 6, 4, 3, seed=1), randn(6, seed=2)
    _, mean, rstd = torch.native_group_norm(x, None, None, 2, 6, 12, groups, 1e-5)
    arguments = (grad, x, mean, rstd, scale, 2, 6, 12, groups, [True] * 3)
    mine = without("torch_private.kernels").native_group_norm_backward(*arguments)
    same(mine, kernels.native_group_norm_backward(*arguments))


def test_products_without_one_dnn_s(without):
    assert without("torch_private.kernels").LINEAR_POINTWISE is None
    ours, x, weight = without("ops.linear"), randn(5, 4).float(), randn(3, 4).float()
    assert not ours.is_fast(x, weight)
    x = leaf(x)
    y = ours.frozen_linear(x, weight)
    torch.testing.assert_close(y, F.linear(x, weight))
    y.sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(5, 4))


def test_codes_without_fbgemm_s(without):
    from lightning_da3.ops import codes

    assert without("torch_private.kernels").ENCODE_ROWS is None
    ours, x = without("ops.codes"), randn(3, 256).float()
    coded = ours.encode(x)
    assert coded.shape == codes.encode(x).shape
    assert (coded.int() - codes.encode(x).int()).abs().max() <= 1  # rounding of one half
    decoded = ours.decode(coded, x.size(), x.stride(), x.dtype)
    torch.testing.assert_close(decoded, codes.decode(coded, x.size(), x.stride(), x.dtype))


def test_what_is_known_of_kernels(without):
    copy = without("torch_private.kernels")
    overload = torch.ops.aten.mm.default
    assert kernels.kernel_of(overload) is torch.ops.aten.mm
    unnamed = type("Overload", (), {"name": lambda self: overload.name()})()
    assert copy.kernel_of(unnamed) is torch.ops.aten.mm
    assert kernels.flop_formula(torch.ops.aten.mm) is not None
    assert kernels.flop_formula(torch.ops.aten.relu) is None
    with pytest.raises(DA3Error, match="counting FLOPs"):
        copy.flop_formula(torch.ops.aten.mm)


# --- tensors, modules, the profiler


def test_tensors_and_their_memory(without):
    copy = without("torch_private.autograd")
    x = torch.zeros(4, 6)
    view = x[1:, ::2]
    assert copy.storage_key(view.untyped_storage()) == copy.storage_key(x.untyped_storage())
    assert copy.storage_key(x.clone().untyped_storage()) != copy.storage_key(x.untyped_storage())
    for ours in (copy, autograd):
        assert ours.is_view(view)
        owner = ours.without_base(x[1:], torch.Size((3, 6)))
        assert not owner._is_view()
        owner.fill_(ours is copy)
        assert x[1:].unique().tolist() == [ours is copy]
    sparse = torch.eye(3).to_sparse()
    assert torch.equal(copy.indices_of(sparse), autograd.indices_of(sparse))
    assert torch.equal(copy.values_of(sparse), autograd.values_of(sparse))
    for call in (copy.version_of, copy.base_of, copy.node_number):
        with pytest.raises(DA3Error, match="Install a version of torch"):
            call(x)
    with pytest.raises(DA3Error, match="naming what a module keeps"):
        copy.next_node_number()
    before = autograd.version_of(x)
    assert (autograd.version_of(x.add_(1)), autograd.base_of(view)) == (before + 1, x)


def test_fake_tensors(without):
    copy = without("torch_private.fake")
    with fake.FakeTensorMode():
        x = torch.empty(3)
    assert fake.is_fake(x)
    assert not copy.is_fake(x)  # where there are no fake tensors
    assert not fake.is_wrapper(x)
    assert not copy.is_wrapper(torch.empty(3))
    with pytest.raises(DA3Error, match="predicting a training step"):
        copy.FakeTensorMode()


def test_layers_with_modes(without):
    copy = without("torch_private.modules")
    for layer in (nn.BatchNorm2d(3), nn.InstanceNorm1d(3), nn.SyncBatchNorm(3)):
        assert isinstance(layer, modules.NORM_LAYERS)
        assert isinstance(layer, copy.NORM_LAYERS)
    for layer in (nn.Dropout(), nn.Dropout2d(), nn.AlphaDropout()):
        assert isinstance(layer, modules.DROPOUT_LAYERS)
        assert isinstance(layer, copy.DROPOUT_LAYERS)
    assert not isinstance(nn.ReLU(), (*copy.NORM_LAYERS, *copy.DROPOUT_LAYERS))


def test_compiled_modules_and_hooks():
    net = nn.Linear(2, 2)
    assert modules.original_of(torch.compile(net)) is net
    assert modules.is_compiled(torch.compile(net))
    assert not modules.is_compiled(net)
    net.compile()
    assert modules.is_compiled(net)
    assert modules.hooks_of(net, modules.FORWARD_HOOKS) == [{}, {}]
    handle = net.register_forward_hook(print)
    assert [*map(len, modules.hooks_of(net, modules.FORWARD_HOOKS))] == [1, 0]
    handle.remove()
    with pytest.raises(DA3Error, match="keeping the hooks"):
        modules.hooks_of(net, ("_none_such",))


def test_the_profiler_s_file_says_what_its_events_do(without):
    copy = without("torch_private.profiling")
    assert copy.is_profiling()  # nobody knows
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        assert profiling.is_profiling()
        held = [torch.ones(1000 * k) for k in (1, 2, 3)]
        held.pop(0)
        held.append(torch.ones(500))
    assert not profiling.is_profiling()
    events, read = profiling.allocations(profiler), copy.allocations(profiler)
    assert sorted(events) == sorted(read)
    assert len(events) >= 5
    assert _highest_sum(read) == _highest_sum(events) >= 24_000


IMPORTS_WITHOUT = """
import pkgutil, torch, lightning, torch.profiler, torch.utils.checkpoint, torch._dynamo
theirs = pkgutil.resolve_name
def resolve(path):
    if path.startswith("torch"): raise AttributeError(path)
    return theirs(path)
pkgutil.resolve_name = resolve
import lightning_da3
from lightning_da3.torch_private import kernels
assert kernels.LINEAR_POINTWISE is None
try:
    lightning_da3.convert(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()))
except lightning_da3.DA3Error as error:
    assert "Install a version of torch" in str(error), error
else:
    raise SystemExit("no error")
"""


@pytest.mark.slow
def test_the_package_can_be_imported_without_any():
    assert pkgutil.resolve_name("torch:Tensor.relu") is torch.Tensor.relu
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS_WITHOUT], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
