"""Faults put into the conversion: found, named, and left out."""

import pytest
import torch
from helpers.comparing import assert_relatively_close
from helpers.verified import CONFIG, Net, assert_same, python_of

from lightning_da3 import (
    ConversionError,
    ConversionWarning,
    InputError,
    convert,
)
from lightning_da3.converting import compared
from lightning_da3.nn.convolution import FrozenConv
from lightning_da3.passes import rewriting


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def faulty(monkeypatch, edit_):
    """Let a pass of the conversion do one thing too many, in graphs."""
    last = rewriting.in_every_part(lambda part, plan, config: edit_(part.gm, part.user_name))
    monkeypatch.setattr(rewriting, "ORDER", (*rewriting.ORDER, last))


def layers_called(gm, name, path):
    called = [n for n in gm.graph.nodes if n.op == "call_module"]
    return [n for n in called if name(n.target).startswith(path)]


def test_a_pass_that_drops_an_activation(monkeypatch):
    def drop_(gm, name):
        for node in layers_called(gm, name, "b.relu"):
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)

    faulty(monkeypatch, drop_)
    net, x = Net(), torch.randn(2, 3, 12, 12)
    paths, model = python_of(net, "the network itself|b stays Python")
    assert len(paths) <= 2
    assert_same(model, net, x)


def test_a_wrong_folding(monkeypatch):
    def shift_(gm, name):
        for node in layers_called(gm, name, "b.conv"):
            layer = gm.get_submodule(node.target)
            if isinstance(layer, FrozenConv):
                layer.bias.data += 0.2

    faulty(monkeypatch, shift_)
    net, x = Net(), torch.randn(2, 3, 12, 12)
    with pytest.warns(ConversionWarning, match=r"outputs, eval, with gradients: 0\.\d+"):
        model = convert(net, CONFIG)
    assert_same(model, net, x)
    assert "b.conv" in dict(model.plan.python)
    other = Net().eval()
    model.load_state_dict(other.state_dict())
    assert_same(model, other, x)


def test_a_wrong_backward_alone(monkeypatch):
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    own = FrozenConv.forward

    def forward(self, x):
        return Twice.apply(own(self, x)) if self.name == "b.conv" else own(self, x)

    monkeypatch.setattr(FrozenConv, "forward", forward)
    net = Net()
    _, found = compared(net, CONFIG)
    assert {c.name.split(",")[0] for c in found if not c.ok} == {"gradients"}
    with pytest.warns(ConversionWarning, match="gradients, eval"):
        model = convert(net, CONFIG)
    x = torch.randn(2, 3, 12, 12, requires_grad=True)
    got, expected = (torch.autograd.grad(f(x).sum(), x) for f in (model, net.eval()))
    assert_relatively_close(got, expected, 1e-4)


@pytest.mark.slow
def test_what_no_module_can_mend_is_an_error(monkeypatch):
    own = rewriting.rewrite

    def wrong(traced, plan, config):
        root = own(traced, plan, config)
        root.register_forward_hook(lambda module, args, y: y + 1)
        return root

    monkeypatch.setattr("lightning_da3.converting.rewrite", wrong)
    with pytest.raises(ConversionError, match=r"does not reproduce the backbone Net.*verify=False"):
        convert(Net(), CONFIG)
    assert convert(Net(), CONFIG, verify=False).plan.python == ()


def test_a_conversion_that_raises_where_the_network_does_not(monkeypatch):
    def raises_(gm, name):
        for node in layers_called(gm, name, "c.relu"):
            gm.get_submodule(node.target).register_forward_hook(refuse)

    def refuse(*_):
        raise ValueError("not today")

    faulty(monkeypatch, raises_)
    with pytest.warns(ConversionWarning, match="it raises ValueError: not today"):
        convert(Net(), CONFIG)


@pytest.mark.slow
def test_gradients_that_no_module_can_mend_are_an_error_that_names_the_exact_mode(monkeypatch):
    own = rewriting.rewrite

    def wrong(traced, plan, config):
        root = own(traced, plan, config)
        root.register_forward_hook(lambda module, args, y: y + 0.5 * (y - y.detach()))
        return root

    monkeypatch.setattr("lightning_da3.converting.rewrite", wrong)
    with pytest.raises(ConversionError, match=r"exact=True\)` computes gradients without codes"):
        convert(Net(), CONFIG)


@pytest.mark.slow
def test_a_conversion_that_refuses_some_inputs_is_taken_with_a_warning(monkeypatch):
    own = rewriting.rewrite

    def refusing(traced, plan, config):
        root = own(traced, plan, config)
        root.register_forward_pre_hook(refuse)
        return root

    def refuse(module, args):
        if len(args[0]) == 3:
            raise InputError("not three")

    monkeypatch.setattr("lightning_da3.converting.rewrite", refusing)
    with pytest.warns(ConversionWarning, match="does not take every input.*not three"):
        model = convert(Net(), CONFIG)
    assert model.plan.python == ()
