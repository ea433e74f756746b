"""The adapter op against plain PyTorch: values, gradients, what is kept, compiled."""

import pytest
import torch
import torch.nn.functional as F
from helpers.ops import FLOAT, kept_bytes, leaf, randn

from lightning_da3.ops.adapter import adapt
from lightning_da3.ops.adapter_cells import AdapterOptions, Weights
from lightning_da3.ops.codes import Rows


def plain_adapter(p, noise, weights, eps=1e-5):
    """The adapter in plain PyTorch, its gate straight-through."""
    pad = weights.squeeze.shape[2] // 2
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[p.dim() - 2]
    hidden = conv(p, weights.squeeze, padding=pad)
    normal = F.group_norm(hidden, 1, weights.scale, weights.shift, eps)
    cells = normal.relu().flatten(2).transpose(1, 2)
    logits = F.linear(cells, weights.attend, weights.attend_bias)
    addend = 4 * F.linear(torch.sigmoid(logits) * cells, weights.value, weights.value_bias)
    logits = logits if noise is None else logits + noise
    soft = torch.sigmoid(logits)
    gate = (logits > 0).to(p.dtype) + soft - soft.detach()

    def on_grid(rows):
        return rows.transpose(1, 2).unflatten(2, p.shape[2:])

    return on_grid(addend), on_grid(gate)


@pytest.mark.parametrize("reads", ["both", "addend", "gate"])
@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize(
    ("shape", "last"),
    [
        ((2, 6, 5), False),
        ((2, 6, 4, 3), False),
        ((2, 6, 4, 3), True),
        ((1, 6, 1, 1), True),
        ((2, 6, 2, 3, 2), False),
    ],
    ids=str,
)
@pytest.mark.parametrize("kernel", [1, 3])
def test_the_adapter_is_that_of_plain_pytorch(kernel, shape, last, noisy, reads):
    torch.manual_seed(1)
    axes, m, o = len(shape) - 2, 4, 5
    sizes = [(m, 6, *[kernel] * axes), (m,), (m,), (1, m), (1,), (o, m), (o,)]
    weights = Weights(*[leaf(torch.randn(size, dtype=torch.float64)) for size in sizes])
    p = torch.randn(shape, dtype=torch.float64)
    p = leaf(p.contiguous(memory_format=torch.channels_last) if last else p)
    noise = torch.randn(shape[0], p[0, 0].numel(), 1, dtype=torch.float64) if noisy else None
    said = adapt(p, noise, weights, AdapterOptions(1e-5, gated=True, exact=True))
    expected = plain_adapter(p, noise, weights)
    torch.testing.assert_close(said, expected)
    pick = {"both": slice(None), "addend": slice(1), "gate": slice(1, None)}[reads]
    others = [torch.randn_like(y) for y in expected[pick]]
    sources = [p, *weights[: 5 if reads == "gate" else None]]
    got = torch.autograd.grad(said[pick], sources, others)
    want = torch.autograd.grad(expected[pick], sources, others)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def test_the_adapter_keeps_codes_and_a_bit_for_every_hidden_value():
    weights = Weights(
        *[leaf(torch.randn(s)) for s in [(4, 64, 3, 3), (4,), (4,), (1, 4), (1,), (32, 4), (32,)]]
    )
    p = leaf(torch.randn(2, 64, 7, 7))
    codes, hidden = Rows.of(p).encode(p).numel(), 2 * 4 * 49
    for exact, expected in (
        (False, codes + hidden // 8),
        (True, (p.numel() + hidden) * FLOAT),
    ):
        kept = kept_bytes(
            lambda *t, e=exact: adapt(t[0], None, weights, AdapterOptions(1e-5, True, e)), p
        )
        assert kept == expected


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e9])
def test_gradients_are_as_precise_whatever_the_range(scale, compiled):
    """Its mean is far from zero, too: 1e9 is far above what half precision holds."""
    torch._dynamo.reset()
    sizes = [(8, 32, 1, 1), (8,), (8,), (1, 8), (1,), (16, 8), (16,)]
    weights = Weights(*[leaf(randn(*s, seed=i).float()) for i, s in enumerate(sizes)])
    p = leaf((randn(3, 32, 5, 5).float() + 2) * scale)

    def gradient(exact):
        def of(p, *weights):
            return adapt(
                p, None, Weights(*weights), AdapterOptions((1e-3 * scale) ** 2, True, exact)
            )

        of = torch.compile(of, backend="aot_eager_decomp_partition") if compiled else of
        said = of(p, *weights)
        others = [randn(*y.shape, seed=9).float() for y in said]
        return torch.autograd.grad(said, [p, *weights], others)

    for one, other in zip(gradient(exact=False), gradient(exact=True), strict=True):
        assert (one - other).norm() <= 0.01 * other.norm()
        assert other.norm() > 0


def test_a_constant_hidden_map_has_a_gradient():
    sizes = [(4, 6, 1, 1), (4,), (4,), (1, 4), (1,), (5, 4), (5,)]
    weights = Weights(
        *[leaf(torch.zeros(s) if i == 0 else torch.ones(s)) for i, s in enumerate(sizes)]
    )
    p = leaf(torch.randn(2, 6, 3, 3))
    got = torch.autograd.grad(
        adapt(p, None, weights, AdapterOptions(1e-5, True, False))[0].sum(), weights
    )
    want = torch.autograd.grad(plain_adapter(p, None, weights)[0].sum(), weights)
    torch.testing.assert_close(got, want, rtol=0.02, atol=1e-4)


@pytest.mark.filterwarnings("ignore")  # of the compiler about itself
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("exact", [False, True], ids=["coded", "exact"])
@pytest.mark.parametrize("shape", [(2, 64, 17), (2, 64, 4, 3)], ids=str)
def test_the_compiled_adapter_keeps_what_the_eager_one_keeps(shape, exact, autocast):
    torch._dynamo.reset()
    kernel = [1] if len(shape) == 3 else [3, 3]
    sizes = [(16, 64, *kernel), (16,), (16,), (1, 16), (1,), (32, 16), (32,)]
    weights = [leaf(randn(*size).float()) for size in sizes]
    p = leaf(randn(*shape).float())

    def ours(p, *weights):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return adapt(p, None, Weights(*weights), AdapterOptions(1e-5, True, exact))

    # quick: types and layouts of the op; what inductor keeps, test_works_with.py measures
    backend = "aot_eager_decomp_partition"
    compiled = torch.compile(ours, backend=backend, fullgraph=True)
    said, expected = compiled(p, *weights), ours(p, *weights)
    torch.testing.assert_close(said, expected)
    others = [torch.randn_like(y) for y in expected]
    got = torch.autograd.grad(said, [p, *weights], others)
    want = torch.autograd.grad(expected, [p, *weights], others)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    kept = [kept_bytes(f, p, *weights, constants=weights) for f in (compiled, ours)]
    assert kept[0] <= kept[1]


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "shape", [(1, 64, 7, 7), (1, 64, 4, 3), (2, 64, 3, 3), (1, 64, 9)], ids=str
)
def test_a_compiler_knows_how_an_adapter_s_results_are_laid_out(shape, last):
    kernel = [1] if len(shape) == 3 else [3, 3]
    sizes = [(16, 64, *kernel), (16,), (16,), (1, 16), (1,), (32, 16), (32,)]
    p = randn(*shape).float()
    if last and len(shape) == 4:
        p = p.contiguous(memory_format=torch.channels_last)
    weights = [randn(*size).float() for size in sizes]
    for exact in (True, False):
        arguments = (p, None, weights, 1e-5, True, exact, torch.float32)
        torch.library.opcheck(
            torch.ops.lightning_da3.adapt.default, arguments, test_utils=("test_faketensor",)
        )


def test_the_adapter_without_a_trained_convolution():
    weights = Weights(
        *[torch.randn(s) for s in [(4, 6, 3, 3), (4,), (4,), (1, 4), (1,), (5, 4), (5,)]]
    )
    p = leaf(torch.randn(2, 6, 4, 4))
    how = AdapterOptions(1e-5, gated=True, exact=False)
    kept = kept_bytes(lambda t: adapt(t, None, weights, how), p)
    own = sum(weight.numel() for weight in weights) * FLOAT
    assert kept == Rows.of(p).encode(p).numel() + 2 * 4 * 16 // 8 + own
    got = torch.autograd.grad(adapt(p, None, weights, how)[0].sum(), p)
    want = torch.autograd.grad(plain_adapter(p, None, weights)[0].sum(), p)
    assert (got[0] - want[0]).norm() <= 0.01 * want[0].norm()


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("strides", [(6, 1, 1, 1), (6, 1, 6, 6)], ids=str)
def test_hidden_values_lie_in_the_backward_as_they_lay_in_the_forward(strides, last, count):
    torch.manual_seed(1)
    sizes = [(4, 6, 1, 1), (4,), (4,), (1, 4), (1,), (5, 4), (5,)]
    tensors = [torch.randn(size) for size in sizes]
    weights = Weights(*[leaf(t) for t in (tensors[0].as_strided(sizes[0], strides), *tensors[1:])])
    layout = torch.channels_last if last else torch.contiguous_format
    p = leaf(torch.randn(count, 6, 4, 3).contiguous(memory_format=layout))
    coded, exact = (
        torch.autograd.grad(
            adapt(p, None, weights, AdapterOptions(1e-5, gated=False, exact=exact))[0].sum(),
            [p, *weights],
        )
        for exact in (False, True)
    )
    for one, other in zip(coded, exact, strict=True):
        assert (one - other).norm() <= 0.03 * other.norm()
