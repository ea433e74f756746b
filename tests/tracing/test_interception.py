"""The length of a traced tensor is a node of the graph, and nothing of anybody's is edited."""

import builtins
import functools
import gc
import math
from math import sqrt
from types import MethodType

import pytest
import torch
from torch import nn

from lightning_da3 import convert
from lightning_da3.tracing.tracer import Tracer


def rows(x):
    return len(x)


def counted(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


class Base(nn.Module):
    def forward(self, x):
        return x.reshape(len(x), -1)


class Inherits(Base):
    pass


class CallsSuper(Base):
    def forward(self, x, *, factor=2.0):
        return super().forward(x) * factor


class CallsBoth(CallsSuper):
    def forward(self, x):
        return super().forward(x) + len(x)


class CallsAFunction(nn.Module):
    def forward(self, x):
        return x * rows(x)


class CallsAMethod(nn.Module):
    def forward(self, x):
        return x * self.rows(x) + self.count([1, 2])

    def rows(self, x):
        return len(x)

    @staticmethod
    def count(items):
        return len(items)


class Decorated(nn.Module):
    @counted
    def forward(self, x):
        return x * len(x)


class InAComprehension(nn.Module):
    def forward(self, x):
        return sum(x * len(y) for y in (x, x))


class Recursive(nn.Module):
    def forward(self, x):
        def half(n):
            return x * len(x) if n < 1 else half(n // 2)

        return half(4)


class WithARoot(nn.Module):
    def forward(self, x):
        return x * sqrt(len(x))  # which fx makes a node, of math.sqrt


class HasAFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.again = (lambda x: x * len(x)), MethodType(Base.forward, self)

    def forward(self, x):
        return self.scale(x).sum() + self.again(x)


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = CallsBoth()

    def forward(self, x):
        return self.inner(x)


KINDS = [Base, Inherits, CallsSuper, CallsBoth, CallsAFunction, CallsAMethod, Decorated]
KINDS += [InAComprehension, Recursive, HasAFunction, WithARoot, Outer]


@pytest.mark.parametrize("kind", KINDS)
def test_a_length_is_a_node(kind):
    module = kind()
    before = [(type(m), dict(vars(m))) for m in module.modules()]
    graph = Tracer().trace(module)
    assert [(type(m), dict(vars(m))) for m in module.modules()] == before
    assert any(node.target is len for node in graph.nodes)
    traced = torch.fx.GraphModule(module, graph)
    for count in (1, 3):
        x = torch.randn(count, 2, 2)
        torch.testing.assert_close(traced(x), module(x))


def test_what_was_traced_is_traced_again():
    module = Outer()
    first = torch.fx.GraphModule(module, Tracer().trace(module))
    again = torch.fx.GraphModule(first, Tracer().trace(first))
    x = torch.randn(3, 2, 2)
    torch.testing.assert_close(again(x), module(x))


def test_nobody_s_class_function_or_builtin_is_edited():
    before = dict(vars(Base)), dict(vars(builtins)), dict(vars(math)), dict(globals())
    Tracer().trace(Outer())
    Tracer().trace(CallsAFunction())
    assert (dict(vars(Base)), dict(vars(builtins)), dict(vars(math)), dict(globals())) == before


def test_no_class_hears_of_it():
    heard = []

    class Hears(nn.Module):
        def __init_subclass__(cls):
            heard.append(cls)

        def forward(self, x):
            return x * len(x)

    class More(Hears):
        pass

    del heard[:]
    Tracer().trace(More())
    assert heard == []


def test_a_name_of_one_s_own_stays():
    namespace = {"nn": nn, "__name__": "mine"}
    source = """
def len(x):
    return 7

class Own(nn.Module):
    def forward(self, x):
        return x * len(x)
"""
    exec(source, namespace)
    x = torch.ones(2)
    traced = torch.fx.GraphModule(module := namespace["Own"](), Tracer().trace(module))
    assert torch.equal(traced(x), x * 7)


def test_a_failed_trace_sets_the_classes_back():
    class Fails(nn.Module):
        def forward(self, x):
            raise ValueError(f"{len([x])} item")

    module = Fails()
    with pytest.raises(ValueError, match="1 item"):
        Tracer().trace(module)
    assert type(module) is Fails


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x):
        return self.conv(x).reshape(len(x), 8, -1).mean(2)


def test_nothing_of_a_trace_is_left_in_what_was_converted():
    """A trace refers to the whole copy of the network, with weights that are folded by now."""

    def tracers():
        gc.collect()
        return {id(each) for each in gc.get_objects() if type(each) is Tracer}

    before = tracers()
    model = convert(nn.Sequential(Inner(), nn.Linear(8, 3)), verify=False)
    assert tracers() <= before
    stacks = [node.meta.get("nn_module_stack", {}) for node in model.backbone.graph.nodes]
    kinds = {kind for stack in stacks for _, kind in stack.values()}
    assert kinds >= {Inner, nn.Linear}
    assert kinds <= {nn.Sequential, Inner, nn.Conv2d, nn.Linear}
