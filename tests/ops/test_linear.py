"""Frozen linear layers and attention: PyTorch's own results, nothing kept."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_da3.memory import saved_activation_bytes
from lightning_da3.nn.linear import FrozenAttention, FrozenLinear, freeze_layers_
from lightning_da3.ops import linear
from lightning_da3.ops.linear import frozen_linear


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def gradient(fn, x):
    x = x.detach().requires_grad_()
    y = fn(x)
    (y * torch.arange(y.numel()).view_as(y).cos()).sum().backward()
    return y.detach(), x.grad


def frozen(module):
    module.eval().requires_grad_(False)
    freeze_layers_(module)
    return module


LAYOUTS = {
    "rows": lambda: torch.randn(6, 7),
    "one row": lambda: torch.randn(7),
    "tokens": lambda: torch.randn(2, 5, 7),
    "transposed": lambda: torch.randn(7, 4, 3).permute(1, 2, 0),
    "expanded": lambda: torch.randn(1, 7).expand(4, 7),
    "no row": lambda: torch.randn(0, 7),
}


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_frozen_linear_is_the_builtin(layout, bias, fast, monkeypatch):
    monkeypatch.setattr(linear, "_HAS_ONEDNN", fast and linear._HAS_ONEDNN)
    x, weight = LAYOUTS[layout](), torch.randn(5, 7)
    shift = torch.randn(5) if bias else None
    got = gradient(lambda t: frozen_linear(t, weight, shift), x)
    want = gradient(lambda t: F.linear(t, weight, shift), x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_frozen_linear_keeps_nothing():
    layer = frozen(nn.Linear(7, 5))
    assert type(layer) is FrozenLinear
    assert saved_activation_bytes(layer, torch.randn(3, 7, requires_grad=True)) == 0
    trained = nn.Linear(7, 5)
    assert saved_activation_bytes(trained, torch.randn(3, 7, requires_grad=True)) == 3 * 7 * 4


def test_frozen_linear_follows_autocast():
    layer, x = frozen(nn.Linear(8, 8)), torch.randn(4, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(4, 8), rtol=0.02, atol=0.02)


def attend(need_weights=False, **masks):
    return lambda layer: lambda x: layer(x, x, x, need_weights=need_weights, **masks)[0]


@pytest.mark.parametrize("first", [True, False], ids=["batch first", "tokens first"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "call",
    [
        attend(),
        attend(attn_mask=None, is_causal=False),
        attend(need_weights=True),
        attend(attn_mask=torch.ones(4, 4).triu(1).bool()),
        lambda layer: lambda x: layer(x, x.flip(1), x, need_weights=False)[0],
        lambda layer: lambda x: layer(x[0], x[0], x[0], need_weights=False)[0],
    ],
    ids=["plain", "no masks", "weights", "mask", "cross", "unbatched"],
)
def test_frozen_attention_is_the_builtin(call, bias, first):
    layer = nn.MultiheadAttention(12, 3, bias=bias, batch_first=first).requires_grad_(False)
    x = torch.randn(4, 4, 12)
    want = gradient(call(layer), x)
    twin = frozen(layer)
    assert type(twin) is FrozenAttention
    torch.testing.assert_close(gradient(call(twin), x), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 12}])
def test_attention_with_extras_is_the_builtin(options):
    layer = nn.MultiheadAttention(12, 3, batch_first=True, **options).eval().requires_grad_(False)
    x = torch.randn(2, 4, 12)
    want = gradient(attend()(layer), x)
    torch.testing.assert_close(gradient(attend()(frozen(layer)), x), want, rtol=1e-5, atol=1e-5)


def test_only_pytorchs_own_types_are_replaced():
    class Mine(nn.Linear):
        pass

    network = frozen(nn.Sequential(nn.Linear(2, 2), Mine(2, 2), nn.Sequential(nn.Linear(2, 2))))
    assert [type(m) for m in (network[0], network[1], network[2][0])] == [
        FrozenLinear,
        Mine,
        FrozenLinear,
    ]
    assert list(network.state_dict())[:2] == ["0.weight", "0.bias"]
