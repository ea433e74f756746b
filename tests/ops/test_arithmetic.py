"""Arithmetic whose operands are computed again: gradients over its cases, and what it refuses."""

import operator

import pytest
import torch
import torch.nn.functional as F

from lightning_da3.memory import saved_activation_bytes
from lightning_da3.ops.arithmetic import Arithmetic, Recipe, arithmetic


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.double) + 0.5


def from_(x):
    return Recipe(kept=x, version=x._version)


# of two operands, each of which is twice what is kept, and one more
CASES = {
    "product": operator.mul,
    "quotient": operator.truediv,
    "power": operator.pow,
    "logits": lambda x, y: F.binary_cross_entropy_with_logits(x, y, reduction="none"),
    "sum of squares": lambda x, y: x**2 + y.sigmoid(),
}


@pytest.mark.parametrize("shapes", [((3, 4), (3, 4)), ((3, 4), (4,)), ((1, 4), (3, 1))], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_gradients(name, shapes):
    if name == "logits" and shapes[0] != shapes[1]:
        shapes = (shapes[0], shapes[0])
    kept = [randn(*shape, seed=i) for i, shape in enumerate(shapes)]

    def again(x, y):
        recipes = [
            Recipe(torch.add, (Recipe(torch.mul, (from_(t.detach()), 2.0)), 1.0)) for t in (x, y)
        ]
        return arithmetic(CASES[name], [x * 2 + 1, y * 2 + 1], recipes)

    leaves = [t.requires_grad_() for t in kept]
    assert torch.equal(again(*leaves), CASES[name](*[t * 2 + 1 for t in leaves]))
    assert torch.autograd.gradcheck(again, leaves)


def test_what_the_gradient_does_not_read_is_not_computed():
    x, y = randn(3, 4).requires_grad_(), randn(3, 4, seed=1)
    z = arithmetic(operator.mul, [x, y], [None, from_(y)])
    torch.testing.assert_close(torch.autograd.grad(z.sum(), x)[0], y)
    assert saved_activation_bytes(lambda: arithmetic(operator.mul, [x, y], [None, from_(y)])) == (
        y.nbytes
    )


def test_recipes_share_what_they_begin_with():
    x = randn(3, 4).requires_grad_()
    one = Recipe(torch.exp, (from_(x.detach()),))
    other = Recipe(torch.mul, (one, one))
    assert [step is one for step in other.steps()] == [False, True, False]
    y = arithmetic(operator.mul, [x.exp(), x.exp() ** 2], [one, other])
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], 3 * (3 * x).exp().detach())


def test_recipes_end_where_something_was_written_or_they_are_long():
    x = randn(3, 4)
    recipe = from_(x)
    for _ in range(32):
        recipe = Recipe(torch.neg, (recipe,))
    assert recipe.holds
    assert not Recipe(torch.neg, (recipe,)).holds
    x.add_(1)
    assert not recipe.holds


OTHERS = {
    "small": lambda x: x[:1].sigmoid(),
    "no arithmetic": lambda x: x.cumsum(0),
    "a tensor by name": lambda x: torch.mul(x, other=x),
    "an unknown operand": lambda x: x * torch.ones(()),
    "half": lambda x: x.bool() * 2,
}


@pytest.mark.parametrize("fn", OTHERS.values(), ids=OTHERS)
def test_all_else_is_called_as_it_is(fn):
    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return own.called(func, args, kwargs or {}, lambda f, a, k: f(*a, **k))

    own, x = Arithmetic(10), randn(3, 4).requires_grad_()
    with Mode():
        y = fn(x)
    assert torch.equal(y, fn(x))
    assert not own._kept
    assert not own._recipes
