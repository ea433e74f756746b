"""Calls of one network beside each other: what one computes with is no other's."""

import copy
import threading

import pytest
import torch
from helpers.comparing import assert_identical
from helpers.learned import CONFIG, batch, converted, outputs
from torch import nn

from lightning_da3 import convert
from lightning_da3.nn.adapter import HostInput
from lightning_da3.tracing.tracer import Tracer


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def beside(model, halfway, *, after=0):
    """Run `halfway` in another thread whenever a call of this one has come to a host."""
    places = [m for m in model.backbone.modules() if isinstance(m, HostInput)]
    here = threading.current_thread()

    def pause(*_):
        if threading.current_thread() is here:
            other = threading.Thread(target=halfway)
            other.start()
            other.join()

    return places[after].register_forward_pre_hook(pause)


def two(**choices):
    return converted("a", "b", **choices).eval()


@pytest.mark.parametrize("after", [0, -1])
def test_a_call_ends_with_the_domain_that_it_began_with(after):
    model, x = two(), batch()
    none, a, b = (outputs(model, name) for name in (None, "a", "b"))
    for begun, change in (("a", "b"), ("b", None), (None, "a")):
        model.set_domain(begun)
        with torch.no_grad(), beside(model, lambda to=change: model.set_domain(to), after=after):
            assert_identical(model(x), {"a": a, "b": b, None: none}[begun])
        assert model.active_domain == change
    model.set_domain("a")
    with torch.no_grad(), beside(model, lambda: model.delete_domain("a"), after=after):
        assert_identical(model(x), a)
    assert_identical(model(x), none)


def test_mixed_calls_beside_plain_ones():
    model, x = two(), batch()
    a, b = outputs(model, "a"), outputs(model, "b")
    model.set_domain("a")
    seen = []

    def others():
        seen.append(torch.stack(model(x, domains=["b"] * len(x))))
        seen.append(model(x, domains=["b", None])[0])

    with torch.no_grad(), beside(model, others, after=-1):
        assert_identical(model(x), a)
        torch.testing.assert_close(torch.stack(model(x, domains=["b", "b"])), b)
    assert len(seen) == 4
    assert_identical(seen[0], b)
    torch.testing.assert_close(seen[1], b[0])


def test_what_is_noted_of_a_call_is_its_own():
    model, x = two(), batch()
    with torch.no_grad():
        for name, logit in (("a", -100.0), ("b", 100.0)):
            for adapter in model.domain(name).adapters.values():
                adapter.attend.weight.zero_()
                adapter.attend.bias.fill_(logit)
    model.set_domain("a")
    for name, other in (("a", torch.randn(6, *x.shape[1:])), ("b", torch.randn(6, *x.shape[1:]))):
        model.fit_statistics(name, [other + 3 * (name == "b")])
    shares, nearest = [], model.nearest_domains(x)
    near = model.nearest_domains(x + 3)

    def others():
        model(torch.randn(3, *x.shape[1:]), domains=["b"] * 3)
        shares.append(model.executed_flops_fraction.item())
        assert model.nearest_domains(x + 3) == near

    with torch.no_grad(), beside(model, others, after=-1):
        model(x)
        assert model.executed_flops_fraction == 0.0
        maps = model.gate_maps(x)
        assert len(maps) == len(model.plan.hosts)
        assert not any(gate.any() for gate in maps.values())
        assert model.nearest_domains(x) == nearest
    assert shares == [1.0] * 3


def test_adapters_are_disabled_for_one_thread():
    model, x = two(), batch()
    none, a, b = (outputs(model, name) for name in (None, "a", "b"))
    model.set_domain("a")
    seen = []

    def others():
        seen.append((model.active_domain, model(x).detach()))

    with torch.no_grad(), model.disable_adapters(), beside(model, others):
        assert model.active_domain is None
        assert_identical(model(x), none)
        with model.disable_adapters():
            assert_identical(model(x), none)
        model.set_domain("b")  # somebody wants it inside
        assert model.active_domain == "b"
        assert_identical(model(x), b)
    assert [name for name, _ in seen] == ["a", "a", "b"]
    for name, y in seen:
        assert_identical(y, {"a": a, "b": b}[name])
    assert_identical(outputs(model, model.active_domain), a)


def test_the_backward_is_of_the_domain_of_its_forward():
    model, x = two(), batch()
    model.set_domain("a")
    model.train().set_progress(0.1)
    trained = list(model.domain("a").parameters())

    def gradients(between):
        torch.manual_seed(1)
        loss = model(x).square().sum()
        between()
        found = torch.autograd.grad(loss, trained)
        model.set_domain("a")
        model.train().set_progress(0.1)
        return found

    def in_a_thread(change):
        def between():
            thread = threading.Thread(target=change)
            thread.start()
            thread.join()

        return between

    want = gradients(lambda: None)
    for change in (
        model.eval,
        lambda: model.set_progress(0.9),
        lambda: model(x, domains=["b"] * 2) if not model.train(False) else None,
    ):
        assert_identical(gradients(change), want)
        assert_identical(gradients(in_a_thread(change)), want)


def test_many_threads():
    model, x, wrong = two(), batch(), []
    want = {name: outputs(model, name) for name in (None, "a", "b")}
    model.set_domain("a")

    def serve(name):
        for _ in range(20):
            got = torch.stack(model(x, domains=[name] * len(x)))
            wrong.append(not torch.equal(got, want[name]))
            wrong.append(not torch.equal(model(x).detach(), want["a"]))

    threads = [threading.Thread(target=serve, args=(name,)) for name in (None, "a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 120
    assert not any(wrong)


def test_copies_are_networks_of_their_own():
    model, x = two(), batch()
    a, b = outputs(model, "a"), outputs(model, "b")
    model.set_domain("a")
    twin = copy.deepcopy(model)
    twin.set_domain("b")
    assert_identical(model(x).detach(), a)
    assert_identical(twin(x).detach(), b)
    with beside(model, lambda: twin.set_domain(None)):
        assert_identical(model(x).detach(), a)
    with model.disable_adapters():
        assert_identical(
            copy.deepcopy(model)(x).detach(), a
        )  # of this thread's, nothing goes along


def test_the_backbone_by_itself_computes_the_active_domain():
    model, x = two(), batch()
    a = outputs(model, "a")
    assert_identical(model.backbone(x).detach(), a)


def test_a_call_inside_another():
    model, x = two(), batch()
    a, b = outputs(model, "a"), outputs(model, "b")
    model.set_domain("a")
    inner, place = [], next(m for m in model.backbone.modules() if isinstance(m, HostInput))

    def call_again(*_):
        if not inner:
            inner.append(None)
            inner[0] = torch.stack(model(x, domains=["b"] * len(x)))

    with place.register_forward_pre_hook(call_again):
        assert_identical(model(x).detach(), a)
    assert_identical(inner[0], b)


class Encoding(nn.Module):
    """Tells when a forward or a method runs."""

    def __init__(self, meanwhile=lambda: None):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        self.fc, self.meanwhile = nn.Linear(8, 5), [meanwhile]

    def encode(self, x):
        for call in self.meanwhile:
            call()
        return self.layers(x).mean((2, 3))

    def forward(self, x):
        return self.fc(self.encode(x))


def in_threads(*functions):
    """What they return, or raise."""
    found = [None] * len(functions)

    def run(i):
        try:
            found[i] = functions[i]()
        except Exception as error:  # noqa: BLE001  # it is returned
            found[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_methods_called_for_the_first_time_by_several_threads():
    net, x = Encoding(), torch.randn(2, 3, 16, 16)
    model, want = convert(net, CONFIG), net.encode(x)
    ready = threading.Barrier(4)

    def first():
        ready.wait()
        return model.encode(x)

    for got in in_threads(*[first] * 4):
        torch.testing.assert_close(got, want)
    assert len(model.methods.made) == 1


def test_calls_of_networks_beside_a_conversion():
    model, plain, x = two(), Encoding(), batch()
    want, other = outputs(model, "a"), torch.randn(2, 3, 16, 16)
    expected, seen = plain(other), []

    def meanwhile():
        with torch.no_grad():
            seen.append(in_threads(lambda: model(x), lambda: plain(other)))

    convert(Encoding(meanwhile), CONFIG)
    assert seen
    assert not [results for results in seen if any(isinstance(r, Exception) for r in results)]
    for ours, theirs in seen:
        assert_identical(ours, want)
        assert_identical(theirs, expected)


def test_networks_traced_beside_each_other():
    call, inside, done = nn.Module.__call__, threading.Event(), threading.Event()

    def wait_for_the_first():
        inside.set()
        done.wait(5)

    second = threading.Thread(target=lambda: Tracer().trace(Encoding(wait_for_the_first)))

    def start_the_second():
        second.start()
        inside.wait(0.2)  # it may not come in

    Tracer().trace(Encoding(start_the_second))
    done.set()
    second.join()
    assert nn.Module.__call__ is call
