"""Gradients where a value that is a little off would change them much."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_da3 import DA3Config, convert


def _linear_attention(x: Tensor) -> Tensor:
    keys = F.relu(x.flatten(2)).transpose(1, 2)
    sums = keys @ (keys.transpose(1, 2) @ F.pad(keys, (0, 1), value=1.0))
    found = sums[..., :-1] / (sums[..., -1:] + 1e-5)
    return found.transpose(1, 2).reshape(x.shape)


STEEP: dict[str, Callable[[Tensor], Tensor]] = {
    "reciprocal": lambda x: 1 / (x.abs() + 1e-3),
    "power": lambda x: (x.abs() + 1e-3) ** -1,
    "logarithm": lambda x: torch.log(x.abs() + 1e-6),
    "signed root": lambda x: torch.sign(x) * torch.sqrt(x.abs() + 1e-8),
    "root of a square": lambda x: torch.rsqrt(x * x + 1e-6),
    "quotient": lambda x: x / (x.flip(1).abs() + 1e-2),
    "angle": lambda x: torch.atan2(x, x.flip(1)),
    "quotient by a product": _linear_attention,
    "sine of much": lambda x: torch.sin(30 * x),
}
DECIDING: dict[str, Callable[[Tensor], Tensor]] = {
    "absolute": torch.abs,
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "maximum": lambda x: torch.maximum(x, x.flip(1)),
    "where": lambda x: torch.where(x > 0, x, 0.1 * x),
    "mask": lambda x: x * (x > 0),
    "filled": lambda x: x.masked_fill(x < 0, 0.0),
    "shrink": lambda x: F.softshrink(x, 0.3),
    "slopes": nn.PReLU(8, init=0.3),
    "threshold": lambda x: F.threshold(x, 0.1, 0.2),
    "pool": nn.AdaptiveMaxPool2d(16),
}
TAME: dict[str, Callable[[Tensor], Tensor]] = {
    "normalized": lambda x: x / (x.norm(dim=1, keepdim=True) + 1e-6),
    "root mean square": lambda x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6),
    "square": lambda x: x**2,
}


class _Net(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor], scale: float) -> None:
        super().__init__()
        self.function, self.scale = function, scale
        self.a, self.b = (nn.Conv2d(c, 8, 3, padding=1) for c in (3, 8))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.function(self.a(x) * self.scale)
        return self.fc(self.b(x).mean((2, 3)))


def _error(function: Callable[[Tensor], Tensor], scale: float) -> float:
    torch.manual_seed(0)
    network = _Net(function, scale).eval()
    converted = convert(network, DA3Config(gate=None))
    x = torch.randn(2, 3, 16, 16, requires_grad=True)
    weights = torch.randn(2, 5)
    expected, got = (torch.autograd.grad(n(x), x, weights)[0] for n in (network, converted))
    return float((expected - got).norm() / expected.norm())


@pytest.mark.parametrize("scale", [1e-2, 1.0, 50.0])
@pytest.mark.parametrize("name", STEEP)
def test_what_is_steep_is_not_computed_from_codes(name: str, scale: float) -> None:
    assert _error(STEEP[name], scale) < 0.01


@pytest.mark.parametrize("scale", [1.0, 50.0])
@pytest.mark.parametrize("name", DECIDING)
def test_what_decides_is_not_computed_from_codes(name: str, scale: float) -> None:
    assert _error(DECIDING[name], scale) < 1e-5


@pytest.mark.parametrize("name", TAME)
def test_what_is_tame_is_computed_again(name: str) -> None:
    plan = convert(_Net(TAME[name], 1.0), DA3Config(gate=None)).plan
    assert any(region.nodes for region in plan.regions)
    assert _error(TAME[name], 1.0) < 0.01


def test_means_over_many_are_not_rounded() -> None:
    def pooled(x: Tensor) -> Tensor:  # generalised means, of values far below 1
        return x.clamp(min=1e-6).pow(3).mean((2, 3), keepdim=True).pow(1 / 3).expand_as(x)

    assert _error(pooled, 1e-3) < 0.01
