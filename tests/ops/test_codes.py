"""Eight-bit codes of any tensor: their bound, their layout, their bytes."""

import math
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lightning_da3.memory.measured import measure_step
from lightning_da3.ops.bits import dense
from lightning_da3.ops.codes import (
    Code,
    Rows,
    decode,
    encode,
    sample_group,
    to_bytes,
)

LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "permuted": lambda x: x.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2),
    "with gaps": lambda x: x[:, ::2],
    "expanded": lambda x: x[:, :1].expand(-1, 4, -1, -1),
}


def randn(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def there_and_back(x, groups=256):
    return decode(encode(x, groups), x.size(), dense(x).stride(), x.dtype, groups)


def elsewhere(x):
    """On devices without FBGEMM, and in compiled code."""
    with mock.patch("lightning_da3.ops.codes._by_fbgemm", return_value=False):
        return there_and_back(x)


def in_memory_order(x):
    """The elements as they lie in memory, found by PyTorch's own strides."""
    x = dense(x)
    return x.as_strided((x.numel(),), (1,)).double()


def bounds(x, groups=256):
    """(max - min) / 510 of the group of every element, and what float32 and `x.dtype` round off."""
    parts = in_memory_order(x).split(groups)
    ranges = torch.cat([(part.max() - part.min()).expand_as(part) for part in parts])
    largest = torch.cat([part.abs().max().expand_as(part) for part in parts])
    rounding = 2 * torch.finfo(torch.float32).eps + torch.finfo(x.dtype).eps
    return ranges / 510 * (1 + 1e-4) + rounding * largest


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_there_and_back(dtype, layout):
    x = LAYOUTS[layout](randn(3, 6, 9, 7, dtype=dtype) * 3 + 1)
    y = there_and_back(x)
    assert y.dtype == x.dtype
    assert y.shape == x.shape
    assert y.stride() == dense(x).stride()
    errors = (in_memory_order(y) - in_memory_order(x)).abs()
    assert (errors <= bounds(x)).all()
    assert not torch.equal(x, y)  # or the bound says nothing


def test_the_bound_is_no_wider_than_needed():
    x = randn(64, 256)
    assert ((there_and_back(x) - x).abs().flatten() > 0.95 * bounds(x)).any()


@settings(max_examples=100, deadline=None)
@given(
    numbers=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=40),
    groups=st.integers(1, 17),
)
@example(numbers=[0.0] * 7 + [3.851859888774472e-34], groups=2)
@example(numbers=[0.0, 1e-35, 0.0, 3e-37], groups=2)
def test_any_finite_numbers(numbers, groups):
    x = torch.tensor(numbers)
    errors = (there_and_back(x, groups) - x).abs().double()
    assert (errors <= bounds(x, groups) + torch.finfo(torch.float32).tiny).all()


@pytest.mark.parametrize("count", [1, 255, 256, 257, 512, 700])
def test_bytes(count):
    codes = encode(randn(count, dtype=torch.float16))
    assert (codes.dtype, codes.shape) == (torch.uint8, (count + 8 * ((count + 255) // 256),))


@pytest.mark.parametrize("shape", [(0,), (2, 0, 3), ()])
def test_no_and_one_element(shape):
    x = randn(*shape)
    assert torch.equal(there_and_back(x), x)


@pytest.mark.parametrize("value", [0.0, -1e-40, 3.7, 1e30])
def test_a_constant_group_is_exact(value):
    x = torch.full((300,), value)
    assert torch.equal(there_and_back(x), x)


def test_the_ends_of_a_group_are_exact_codes():
    x = randn(1, 256)
    codes = encode(x)
    assert (codes[x.argmin()], codes[x.argmax()]) == (0, 255)
    step, low = codes[256:].view(torch.float32)
    assert low == x.min()
    torch.testing.assert_close(step, (x.max() - x.min()) / 255)


@pytest.mark.parametrize("how", [there_and_back, elsewhere], ids=["cpu", "elsewhere"])
@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e-30, 1e37])
def test_infinities_stay_alone(scale, how):
    x = randn(3, 256) * scale
    x[1, 5], x[1, 7], x[2] = math.inf, -math.inf, math.inf
    x[2, 3] = 0.0
    y = how(x)
    finite = x.isfinite()
    assert torch.equal(y[~finite], x[~finite])
    errors = (y - x)[finite]
    assert errors.abs().max() < (x[finite].max() - x[finite].min()) / 500
    assert torch.equal(y[0], how(x[0]))


def test_not_a_number_stays_alone_elsewhere():
    x = randn(2, 256)
    x[1, 5] = math.nan
    y = elsewhere(x)
    assert torch.equal(y.isnan(), x.isnan())
    assert not there_and_back(x)[0].isnan().any()


@pytest.mark.parametrize("how", [there_and_back, elsewhere], ids=["cpu", "elsewhere"])
@pytest.mark.parametrize("scale", [1e-6, 1e-9, 1e-12, 1e-30])
def test_tiny_numbers_keep_their_range(scale, how):
    x = randn(4, 256)
    x[1] = 1.0  # groups of every kind beside each other
    x[2] = 0.0
    y = how(torch.cat((x * scale, x)))
    torch.testing.assert_close(y[:4] / scale, how(x), rtol=0, atol=0.03)
    torch.testing.assert_close(y[4:], how(x))


def test_memory_order_is_what_is_coded():
    """Groups of a channels_last tensor are of neighbouring pixels, and nothing is copied first."""
    x = randn(2, 256, 3, 3).to(memory_format=torch.channels_last)
    scale = torch.arange(1.0, 10.0).view(1, 1, 3, 3)

    def steps(x):
        return encode(x).view(-1, 264)[:, 256:260].contiguous().view(torch.float32)

    torch.testing.assert_close(steps(x * scale), steps(x) * scale.flatten().repeat(2).unsqueeze(1))


def test_the_argument_is_left_unchanged():
    x = randn(300).requires_grad_()
    before = x.detach().clone()
    assert not encode(x).requires_grad
    assert torch.equal(x, before)


def test_to_bytes_cuts_off():
    x = torch.arange(0, 256, 0.25)
    assert torch.equal(to_bytes(x), x.floor().to(torch.uint8))


@pytest.mark.parametrize("count", [512, 700])
def test_compiled(count):
    x = randn(count)
    torch._dynamo.reset()
    compiled = torch.compile(there_and_back, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), there_and_back(x))


@pytest.mark.parametrize(
    "shape", [(2, 3, 5, 4), (2, 3, 1, 1), (1, 2, 9, 9), (0, 3, 2, 2), (2, 3, 0)]
)
def test_codes_of_cells(shape):
    x = torch.randn(shape, dtype=torch.float64)
    rows = Rows.of(x)
    back = rows.decode(rows.encode(x))
    assert (back.shape, back.dtype) == (x.shape, x.dtype)
    assert not rows.last
    if x.numel():
        assert (back - x).abs().max() <= (x.max() - x.min()) / 510 + 1e-6
        assert x[0].numel() % rows.group == 0  # no group reaches into two samples
        assert rows.group % x[0, 0].numel() == 0


@pytest.mark.parametrize(("cells", "channels", "together"), [(7, 160, 1), (4, 64, 4), (2, 48, 16)])
def test_channels_of_few_cells_share_a_range(cells, channels, together):
    x = torch.randn(2, channels, cells, cells)
    rows = Rows.of(x)
    assert rows.group == together * cells**2
    assert rows.encode(x).numel() == x.numel() + 2 * channels // together * 8


def test_tokens_do_not_share_a_range():
    tokens = torch.randn(2, 7, 300)
    tokens[:, 0] *= 1e-3  # a class token
    x = tokens.transpose(1, 2)
    rows = Rows.of(x)
    assert rows.last
    error = (rows.decode(rows.encode(x)) - x).abs().transpose(1, 2)
    assert (error.amax(2) <= (tokens.amax(2) - tokens.amin(2)) / 500).all()


def test_the_codes_of_a_sample_do_not_depend_on_its_batch():
    x = torch.randn(3, 5, 7, 11)
    whole, alone = encode(x, sample_group(x)), encode(x[1:2], sample_group(x[1:2]))
    assert sample_group(x) == sample_group(x[1:2]) == 77
    assert torch.equal(whole.view(3, -1)[1], alone)


@pytest.mark.parametrize("width", [16, 40, 64, 97, 152, 768])
def test_a_token_far_smaller_than_its_neighbours_keeps_its_own_range(width: int) -> None:
    x = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(0))
    x[:, 0] *= 1e-4  # a class token, say
    code = Code.of(x)
    back = code.decode(code.encode(x))
    norm = torch.nn.functional.layer_norm
    torch.testing.assert_close(
        norm(back, (width,), eps=1e-12), norm(x, (width,), eps=1e-12), rtol=0, atol=0.03
    )


@pytest.mark.parametrize("value", [1e-9, math.inf])
def test_what_fbgemm_cannot_code_takes_no_memory_of_its_own(value):
    x = randn(512, 4096).mul_(value if value < 1 else 1.0)
    if value > 1:
        x[:, ::64] = value
    found = []

    def back():
        found[:] = [there_and_back(x)]

    peak = measure_step(back, repeats=0).peak_bytes
    allowed = 1.1 * (x.nbytes + encode(x).nbytes)  # as for any other values
    assert peak <= allowed + 2**21
    assert torch.equal(found[0].isinf(), x.isinf())
    finite = ~x.isinf()
    assert (found[0] - x)[finite].abs().max() <= x[finite].abs().max() / 100
