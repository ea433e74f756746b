"""What a host's adapter does on tokens."""

import math

import pytest
import torch
from helpers.ops import (
    gradcheck,
    leaf,
    randn,
)

from lightning_da3.ops.host import divides
from lightning_da3.ops.tokens import TokenGrid, read_tokens, write_tokens

TOKENS = [((17,), 1), ((11,), 2), ((7,), 0), ((6, 8), 0), ((7, 5), 0), ((2, 4, 4), 0)]


@pytest.mark.parametrize(("size", "own"), TOKENS)
@pytest.mark.parametrize("gated", [True, False])
def test_tokens_gradcheck(size, own, gated):
    place = TokenGrid.of(size, own, 4)
    x = randn(2, *size, 3)
    cells = own + math.prod(place.grid)
    gate = (randn(2, 1, cells, seed=1) > -0.5).double() if gated else None
    addend = randn(2, 3, cells, seed=2)
    gradcheck(lambda t: [r * 1 for r in read_tokens(t * 1, place)], x)
    gradcheck(lambda f, a: write_tokens(f, a, gate, place, exact=True), x, addend)


@pytest.mark.parametrize(("size", "own"), TOKENS)
def test_tokens_lie_in_cells(size, own):
    place = TokenGrid.of(size, own, 4)
    x = randn(2, *size, 3)
    through, p = read_tokens(x, place)
    assert through is x
    assert p.shape == (2, 3, own + math.prod(place.grid))
    assert torch.equal(p[:, :, :own].transpose(1, 2), x.reshape(2, -1, 3)[:, :own])
    y = write_tokens(torch.zeros_like(x), p, torch.ones(2, 1, p.shape[2]).double(), place)
    if divides(place.size, place.grid):  # what was spread from the cells has the cells' means
        torch.testing.assert_close(read_tokens(y, place)[1], p)
    assert torch.equal(y.reshape(2, -1, 3)[:, -1], p[:, :, -1])


def test_the_gradient_of_the_gate_of_single_tokens_is_exact():
    place = TokenGrid.of((10,), 1, 9)
    f, addend, gate = randn(2, 10, 3), randn(2, 3, 10, seed=1), leaf(torch.ones(2, 1, 10).double())
    y = write_tokens(f.clone(), addend, gate, place, exact=True)
    grad = randn(*y.shape, seed=4)
    (got,) = torch.autograd.grad(y, gate, grad)
    torch.testing.assert_close(got[:, 0], (grad * f).sum(2))
