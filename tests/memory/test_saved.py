"""Saved bytes against sums made by hand."""

import gc
from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from lightning_da3.errors import DA3Error
from lightning_da3.memory import SavedActivations, saved_activation_bytes

FLOAT = 4  # bytes


class Hides(torch.autograd.Function):
    """y = 2x, with tensors in attributes of ctx, where `saved_tensors_hooks` do not look."""

    @staticmethod
    def forward(ctx, x):
        ctx.hidden = x + 1
        ctx.nested = {"a": [x + 2, (x + 3,)], "again": ctx.hidden, "flag": True}
        ctx.nested["itself"] = ctx.nested
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class HidesModule(nn.Module):
    def forward(self, x):
        return Hides.apply(x)


def conv_chain():
    # (1, 3, 8, 8) -> (1, 4, 6, 6) -> (1, 4, 6, 6) -> (1, 5, 4, 4)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3))


CHAIN_INPUT, CHAIN_RELU = 3 * 8 * 8 * FLOAT, 4 * 6 * 6 * FLOAT


def test_linear_keeps_its_input():
    assert saved_activation_bytes(nn.Linear(8, 4), torch.randn(2, 8)) == 2 * 8 * FLOAT


def test_a_storage_that_two_layers_save_counts_once():
    # ReLU saves its output, which is the second convolution's input
    assert saved_activation_bytes(conv_chain(), torch.randn(1, 3, 8, 8)) == CHAIN_INPUT + CHAIN_RELU


def test_by_module_is_by_layer_and_sums_to_bytes():
    net, x = conv_chain(), torch.randn(1, 3, 8, 8)
    with SavedActivations(net) as saved:
        y = net(x)
    assert saved.by_module == {"0": CHAIN_INPUT, "1": CHAIN_RELU}
    assert saved.bytes == CHAIN_INPUT + CHAIN_RELU
    assert y.requires_grad


def test_what_runs_between_submodules_belongs_to_their_parent():
    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), HidesModule()

        def forward(self, x):
            y = self.first(x)
            y = y.sigmoid()  # saves its output
            y = Hides.apply(y)  # hides three tensors
            y = self.second(y)
            return y.sigmoid()

    net, size = nn.Sequential(Parent()), 2 * 8 * FLOAT
    with SavedActivations(net) as saved:
        y = net(torch.randn(2, 8))
        y = (y.exp() + y).sigmoid()
    assert saved.by_module == {
        "0.first": size,
        "0": size + 3 * size + size,
        "0.second": 3 * size,
        "": size + size,
    }
    assert saved.bytes == sum(saved.by_module.values())
    assert y.requires_grad


class KeepsInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.hidden = x
        return x.square()


def test_the_first_module_that_saved_a_storage_gets_it_however_it_was_saved():
    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.hides, self.saves = nn.Module(), nn.Module()
            self.hides.forward, self.saves.forward = KeepsInput.apply, torch.square

        def forward(self, x):
            return self.hides(x) + self.saves(x)

    net, x = Parent(), torch.randn(5, requires_grad=True)
    with SavedActivations(net) as saved:
        y = net(x)
    assert saved.by_module == {"hides": 5 * FLOAT}
    assert y.requires_grad


def test_without_a_module_everything_is_outside():
    net = conv_chain()
    with SavedActivations() as saved:
        y = net(torch.randn(1, 3, 8, 8))
    assert saved.by_module == {"": CHAIN_INPUT + CHAIN_RELU} == {"": saved.bytes}
    assert y.requires_grad


@pytest.mark.parametrize("freeze", [False, True])
def test_parameters_and_buffers_do_not_count_however_they_are_called(freeze):
    net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).eval()
    net.requires_grad_(not freeze)
    x = torch.randn(2, 8, requires_grad=True)
    expected = (1 if freeze else 2) * 2 * 8 * FLOAT  # frozen: only batch norm keeps its input
    for fn in (net, net.forward, lambda x: net(x), lambda x: net[1](F.linear(x, net[0].weight))):
        assert saved_activation_bytes(fn, x) == expected


class Shift(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.randn(8))
        self.scale = nn.Parameter(torch.randn(8))

    def forward(self, x):
        return x * self.shift * self.scale.data


def test_buffers_and_other_names_of_parameters_do_not_count():
    net, x = Shift(), torch.randn(2, 8, requires_grad=True)
    for fn in (net, net.forward, lambda x: net(x)):
        assert saved_activation_bytes(fn, x) == 0
    assert saved_activation_bytes(lambda x: x * torch.randn(8), x) == 8 * FLOAT


def test_parameters_used_by_functions_do_not_count():
    x, w = torch.randn(1, 3, 8, 8), nn.Parameter(torch.randn(4, 3, 1, 1), requires_grad=False)
    x.requires_grad_()
    assert saved_activation_bytes(lambda x: F.conv2d(x, w), x) == x.nbytes
    assert saved_activation_bytes(F.conv2d, x, w) == x.nbytes
    v = nn.Parameter(torch.randn(3, 1, 1))
    assert saved_activation_bytes(lambda x: x * v[None], x) == x.nbytes


def test_leaf_tensors_that_require_a_gradient_are_parameters():
    x, w = torch.randn(2, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    assert saved_activation_bytes(lambda x: F.linear(x, w), x) == 2 * 8 * FLOAT


def test_inputs_count_even_where_they_require_a_gradient():
    x = torch.randn(2, 8, requires_grad=True)
    assert saved_activation_bytes(torch.square, x) == 2 * 8 * FLOAT
    assert saved_activation_bytes(lambda pair: pair["x"].square(), {"x": x}) == 2 * 8 * FLOAT
    net = nn.Linear(8, 8)
    with SavedActivations(net) as saved:
        y = net(x)
    assert saved.bytes == 2 * 8 * FLOAT
    assert y.requires_grad


def test_a_leaf_made_inside_is_an_activation():
    def fn(x):
        return (x * 2).requires_grad_().square()

    assert saved_activation_bytes(fn, torch.randn(2, 8)) == 2 * 8 * FLOAT


def test_a_view_keeps_its_whole_storage():
    x, w = torch.randn(100, 8), torch.randn(8, requires_grad=True)
    assert saved_activation_bytes(lambda x: x[:1] * w, x) == 100 * 8 * FLOAT


def test_tensors_hidden_on_ctx_count_once_each():
    x = torch.randn(5, requires_grad=True)
    before = Hides.apply(x)  # alive, but not made by what is measured
    assert saved_activation_bytes(Hides.apply, x) == 3 * 5 * FLOAT
    assert saved_activation_bytes(HidesModule(), x) == 3 * 5 * FLOAT
    assert before.requires_grad


def test_what_is_dead_after_the_forward_does_not_count():
    def drops_its_graph(x):
        return Hides.apply(x.square()).detach()

    x = torch.randn(5, requires_grad=True)
    assert saved_activation_bytes(drops_its_graph, x) == 0  # though x itself is alive
    assert saved_activation_bytes(lambda x: (x.detach() * 2).relu(), x) == 0
    with torch.no_grad():
        assert saved_activation_bytes(conv_chain(), torch.randn(1, 3, 8, 8)) == 0


def test_checkpointing_keeps_the_input_only():
    net, x = conv_chain(), torch.randn(1, 3, 8, 8, requires_grad=True)
    for reentrant in (False, True):

        def fn(x, reentrant=reentrant):
            # the random state that it keeps by default is hidden on ctx: 5,056 bytes more
            return checkpoint(net, x, use_reentrant=reentrant, preserve_rng_state=False)

        assert saved_activation_bytes(fn, x) == CHAIN_INPUT


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
def test_sparse_tensors_count_by_their_parts():
    w, values = torch.randn(4, 2, requires_grad=True), torch.ones(2)
    coo = torch.sparse_coo_tensor(torch.tensor([[0, 2], [1, 3]]), values, (4, 4)).coalesce()
    csr = torch.sparse_csr_tensor(torch.tensor([0, 1, 1, 2, 2]), torch.tensor([1, 3]), values)
    for sparse, indices in ((coo, 2 * 2), (csr, 5 + 2)):
        size = indices * 8 + 2 * FLOAT
        assert saved_activation_bytes(lambda s: torch.sparse.mm(s, w), sparse) == size


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
def test_a_tensor_without_a_storage_is_refused():
    with pytest.raises(DA3Error, match=r"layout torch\._mkldnn and shape \(2, 3\)"):
        saved_activation_bytes(lambda x: x, torch.randn(2, 3).to_mkldnn())


def test_gradients_are_the_same_and_can_be_taken_twice():
    net, x = conv_chain().double(), torch.randn(1, 3, 8, 8, dtype=torch.double, requires_grad=True)
    (expected,) = torch.autograd.grad(net(x).square().sum(), x)
    with SavedActivations(net):
        loss = net(x).square().sum()
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=0)
    assert torch.autograd.grad(gradient.square().sum(), x)[0].abs().sum() > 0


def test_a_saved_tensor_changed_in_place_is_still_an_error():
    x = torch.randn(3, requires_grad=True)
    with SavedActivations():
        y = x.sigmoid()
        y.add_(1)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation.*version 1"):
        y.sum().backward()


def test_nothing_is_kept_alive_that_autograd_would_free():
    x = torch.randn(3, requires_grad=True)
    with SavedActivations() as saved:
        y = x.sigmoid()  # a saved output: holding it from its own node would be a cycle
        storage = StorageWeakRef(y.untyped_storage())
        del y
        assert storage.expired()
    assert saved.bytes == 0
    with SavedActivations() as saved:
        y = x.sigmoid()
        y.sum().backward()
    assert saved.bytes == 0  # freed by backward


def test_no_hooks_are_left_behind():
    net, x = conv_chain(), torch.randn(1, 3, 8, 8)
    with SavedActivations(net):
        net(x)
    with suppress(RuntimeError), SavedActivations(net) as failed:
        y = net(x)
        net(torch.randn(1, 1, 1, 1))
    assert failed.bytes == 0
    assert y.requires_grad
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert gc.get_freeze_count() == 0
    y = torch.randn(3, requires_grad=True).sigmoid()
    y.add_(1)
    with pytest.raises(RuntimeError, match="output 0 of Sigmoid"):  # autograd's own check
        y.sum().backward()


def test_what_the_user_froze_for_the_collector_stays_so():
    gc.freeze()
    frozen, x = gc.get_freeze_count(), torch.randn(5, requires_grad=True)
    try:
        before = Hides.apply(x)
        assert saved_activation_bytes(HidesModule(), x) == 3 * 5 * FLOAT
        assert before.requires_grad
        assert gc.get_freeze_count() > frozen // 2 > 0  # some of it may be gone; unfrozen, all is
    finally:
        gc.unfreeze()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler about itself
def test_compiled_modules_are_measured_whole():
    def net():
        return nn.Sequential(nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 8))

    compiled_in_place = net()
    compiled_in_place[1].compile(backend="aot_eager")
    size = 2 * 8 * FLOAT  # the input, and what sigmoid keeps
    compiled = torch.compile(net(), backend="aot_eager")
    for module in (compiled, nn.Sequential(compiled), compiled_in_place):
        assert saved_activation_bytes(module, torch.randn(2, 8)) == 2 * size
    with SavedActivations(compiled_in_place) as saved:
        y = compiled_in_place(torch.randn(2, 8))
    assert saved.by_module == {"0": size, "": size}
    assert y.requires_grad


def test_a_block_can_be_entered_again():
    net, x = nn.Linear(8, 8), torch.randn(2, 8)
    saved = SavedActivations(net)
    for size in (2, 4):
        with saved:
            y = net(x.repeat(size, 1))
        assert saved.bytes == size * 2 * 8 * FLOAT
    assert y.requires_grad


def test_attribution_survives_an_error_that_the_parent_catches():
    class Catches(nn.Module):
        def __init__(self):
            super().__init__()
            self.child = nn.Linear(3, 3)

        def forward(self, x):
            with suppress(RuntimeError):
                self.child(x[:, :1])
            return x.square()

    net = nn.Sequential(Catches())
    with SavedActivations(net) as saved:
        y = net(torch.randn(2, 3, requires_grad=True))
    assert saved.by_module == {"0": 2 * 3 * FLOAT}
    assert y.requires_grad
