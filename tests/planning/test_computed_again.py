"""What is computed again: it draws nothing, overwrites nothing, and cuts no gradient."""

import pytest
import torch
import torch.nn.functional as F
from helpers.around import Around, assert_same_gradients, gradient_error, input_gradient, loss
from helpers.marks import others_slow
from torch import nn

from lightning_da3 import DA3Config, MemoryConfig, convert


def attention(x, **how):
    tokens = x.flatten(2).transpose(1, 2)
    q, k, v = tokens.sigmoid(), tokens.tanh(), F.gelu(tokens)
    y = F.scaled_dot_product_attention(q, k, v, **how)
    return y.transpose(1, 2).view_as(x)


DRAWS = {
    "attention": lambda x: attention(x, dropout_p=0.4),
    "dropout": lambda x: F.dropout(F.gelu(x), 0.4, training=True),
    "dropout of torch": lambda x: torch.dropout(F.gelu(x), 0.4, True),
    "alpha dropout": lambda x: F.alpha_dropout(F.gelu(x), 0.4, True),
    "bernoulli_": lambda x: F.gelu(x) * torch.empty_like(x).bernoulli_(0.7).sigmoid(),
    "normal_": lambda x: F.gelu(x) * torch.zeros_like(x).normal_().sigmoid(),
    "uniform_": lambda x: F.gelu(x) * torch.zeros_like(x).uniform_().exp(),
    "exponential_": lambda x: F.gelu(x) * torch.zeros_like(x).exponential_().tanh(),
    "rand_like": lambda x: F.gelu(x) * torch.rand_like(x).tanh(),
    "normal": lambda x: F.gelu(x) * torch.normal(0.0, 1.0, x.shape, dtype=x.dtype).tanh(),
    "bernoulli": lambda x: F.gelu(x) * torch.bernoulli(torch.full_like(x, 0.5)).tanh(),
    "poisson": lambda x: F.gelu(x) * torch.poisson(torch.ones_like(x)).tanh(),
    "rrelu": lambda x: F.rrelu(F.gelu(x), 0.1, 0.9, training=True),
    "gumbel softmax": lambda x: F.gelu(x) * F.gumbel_softmax(x, dim=1),
    "init": lambda x: F.gelu(x) * nn.init.trunc_normal_(torch.zeros_like(x)).tanh(),
    "fractional pool": lambda x: F.fractional_max_pool2d(F.gelu(x), 2, output_size=5),
    "fractional layer": nn.Sequential(nn.GELU(), nn.FractionalMaxPool2d(2, 6), nn.Sigmoid()),
}


@pytest.mark.parametrize(
    "name", others_slow(DRAWS, "attention", "normal_", "rand_like", "init", "rrelu")
)
def test_numbers_are_drawn_once(name):
    """By finite differences: in another layout, PyTorch draws in another order."""
    torch.manual_seed(0)
    network = Around(DRAWS[name]).double().eval()
    x = torch.randn(2, 3, 16, 16, dtype=torch.double)
    for exact, tolerance in ((True, 1e-5), (False, 0.05)):
        config = DA3Config(gate=None, memory=MemoryConfig(exact=exact))
        model = convert(network, config, verify=False)  # it draws in another order
        gradient = input_gradient(model, x)
        step = 1e-5 * gradient / gradient.norm()
        slope = (loss(model, x + step) - loss(model, x - step)) / 2e-5
        assert abs(slope - gradient.norm()) <= tolerance * slope


IN_PLACE = {
    "tanh_": torch.tanh_,
    "exp_": torch.exp_,
    "sigmoid_": torch.sigmoid_,
    "elu_": F.elu_,
    "selu_": F.selu_,
    "celu_": F.celu_,
    "leaky_relu_": F.leaky_relu_,
    "hardtanh_": F.hardtanh_,
    "threshold_": lambda x: F.threshold_(x, 0.1, 0.0),
    "rrelu_": lambda x: F.rrelu_(x),
    "method": lambda x: x.tanh_(),
    "named": lambda x: F.elu(x, inplace=True),
    "by position": lambda x: F.elu(x, 1.0, True),
    "celu by position": lambda x: F.celu(x, 1.0, True),
    "slope by position": lambda x: F.leaky_relu(x, 0.1, True),
    "operator": lambda x: torch.ops.aten.tanh_(x),
    "into a view": lambda x: x.flatten(2).tanh_().view_as(x),
    "into what reshape gave": lambda x: x.reshape(2, 8, 64).tanh_().reshape(x.shape),
    "a product": lambda x: x.mul_(0.5).sigmoid(),
    "clamped": lambda x: F.gelu(torch.clamp_(x, -1.0, 1.0)),
}


@pytest.mark.parametrize(
    "name", others_slow(IN_PLACE, "tanh_", "elu_", "by position", "into a view")
)
def test_what_writes_in_place_is_not_computed_from_what_is_kept(name):
    function = IN_PLACE[name]
    assert_same_gradients(lambda x: function(F.gelu(function(x * 2.0))))


def test_what_is_kept_is_not_overwritten_behind_what_is_computed_again():
    def function(x):
        y = F.gelu(x * 2.0).tanh()
        return y + x.add_(1.0)

    assert_same_gradients(function)


CUTS = {
    "rfft": lambda x: torch.fft.irfft2(torch.fft.rfft2(x), s=x.shape[-2:]),
    "fft": lambda x: torch.fft.ifft(torch.fft.fft(x.tanh()) * (1 + 2j)).real,
    "complex": lambda x: (torch.complex(x, x.tanh()) * torch.complex(x.sigmoid(), x)).real,
    "view_as_complex": lambda x: torch.view_as_real(
        torch.view_as_complex(x.view(2, 8, 8, 4, 2).contiguous()).exp()
    ).flatten(3),
    "imaginary": lambda x: torch.fft.fft2(x).imag.tanh(),
    "topk": lambda x: x.flatten(2).topk(16, 2).values[..., None],
    "max": lambda x: x.max(2).values[..., None] * x,
    "max by index": lambda x: x.max(2)[0][..., None].tanh() * x,
    "min, unpacked": lambda x: F.gelu(x) - x.min(dim=3, keepdim=True).values,
    "sort": lambda x: x.sort(3).values.sigmoid() * x,
    "kthvalue": lambda x: x.kthvalue(3, 3).values[..., None] * x,
    "median": lambda x: x.flatten(2).median(2).values[..., None, None] * x,
    "mode": lambda x: x.mode(2).values[..., None] * x,
    "cummax": lambda x: x.cummax(2).values.tanh(),
    "qr": lambda x: torch.linalg.qr(x).Q * x,
    "svd": lambda x: torch.linalg.svd(x).S[..., None] * x,
    "eigh": lambda x: torch.linalg.eigh(x @ x.transpose(-1, -2)).eigenvalues[..., None] * x,
    "slogdet": lambda x: torch.linalg.slogdet(x).logabsdet[..., None, None] * x,
    "aminmax": lambda x: x / (1 + x.aminmax(dim=3, keepdim=True).max.abs()),
    "var_mean": lambda x: torch.var_mean(x, (2, 3), keepdim=True)[0] * x,
    "split": lambda x: torch.cat([y.tanh() for y in x.split(4, 1)], 1),
    "a list": lambda x: torch.cat(torch.split(x.tanh(), [2, 6], 1), 1).sigmoid(),
    "unbind": lambda x: torch.stack(F.gelu(x).unbind(1), 1).sigmoid(),
}


@pytest.mark.parametrize(
    "name", others_slow(CUTS, "rfft", "view_as_complex", "topk", "max", "qr", "a list")
)
def test_gradients_pass_through_whatever_a_function_returns(name):
    assert_same_gradients(CUTS[name])


DETACHES = {
    "a factor": lambda x: x / (1 + x.detach().mean((2, 3), keepdim=True).abs()),
    "a branch": lambda x: F.gelu(x) * F.gelu(x).detach(),
    "a gate": lambda x: x + (F.gelu(x) - x.tanh()).detach(),
    "straight through": lambda x: x.tanh() + (x.round() - x.tanh()).detach(),
    "in the middle": lambda x: (F.gelu(x).detach() * x.sigmoid()).tanh(),
    "data": lambda x: x.tanh() * F.gelu(x).data,
    "function": lambda x: torch.detach(x).tanh() * x.sigmoid(),
    "in place": lambda x: x.tanh() * (x * 2.0).detach_().sigmoid(),
    "all but the input's sum": lambda x: F.gelu(x).detach().sigmoid() + x,
    "norm": lambda x: x / x.detach().norm(dim=1, keepdim=True).clamp(min=1e-3) * x.sigmoid(),
}


@pytest.mark.parametrize("name", others_slow(DETACHES, "a factor", "straight through", "in place"))
def test_detaching_cuts_the_same_paths(name):
    assert_same_gradients(DETACHES[name])


def test_what_is_wholly_detached_has_no_gradient():
    torch.manual_seed(0)
    network = Around(lambda x: F.gelu(x * 2.0).detach()).eval()
    for exact in (True, False):
        model = convert(network, DA3Config(gate=None, memory=MemoryConfig(exact=exact)))
        x = torch.randn(2, 3, 16, 16, requires_grad=True)
        y = model(x).sum()
        gradient = torch.autograd.grad(y, x, allow_unused=True)[0] if y.requires_grad else None
        assert gradient is None or not gradient.any()


def test_the_helpers_tell_a_difference():
    torch.manual_seed(0)
    network, x = Around(F.gelu), torch.randn(2, 3, 16, 16)
    assert gradient_error(network, x, exact=True) < 1e-5
    assert not torch.equal(input_gradient(network, x), input_gradient(network, x + 1))
