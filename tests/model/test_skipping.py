"""Domains that skip residual branches: the network is a smaller one for them."""

import copy
import pickle

import pytest
import torch
from helpers.comparing import assert_identical, score
from helpers.domains import refused
from helpers.skips import KINDS, converted, images, network, pair, scaled, tokens
from torch.utils.flop_counter import FlopCounterMode

from lightning_da3 import (
    CheckpointError,
    ConfigError,
    DA3Error,
    GateConfig,
    MemoryConfig,
    convert,
    step_costs,
)
from lightning_da3.memory import measure_step, saved_activation_bytes
from lightning_da3.nn.call import Noise

BRANCHES = ["blocks.0", "blocks.2"]


def outputs(model, name, x=None):
    model.set_domain(name)
    with torch.no_grad():
        return model.eval()(images() if x is None else x)


def gradients(model, x):
    x = x.clone().requires_grad_()
    trained = {n: p for n, p in model.domain("a").named_parameters() if p.requires_grad}
    loss = score(model.train()(x))
    found = torch.autograd.grad(loss, [*trained.values(), x])
    return loss, dict(zip([*trained, "x"], found, strict=True))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_network_without_these_blocks(kind, exact):
    model, other = pair(kind, exact=exact)
    x = images()
    assert_identical(outputs(model, "a", x), outputs(other, "a", x))
    (loss, ours), (same, theirs) = gradients(model, x), gradients(other, x)
    assert torch.equal(loss, same)
    if kind == "attention":
        theirs = {k.replace("blocks__1.", "blocks__1__call2."): v for k, v in theirs.items()}
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert torch.equal(gradient, theirs[name]), name
    assert saved_activation_bytes(model, x) == saved_activation_bytes(other, x)


@pytest.mark.parametrize("kind", ["post", "scaled", "attention"])
def test_hosts_in_it_neither_act_nor_train(kind):
    model, _ = pair(kind)
    closed = model.domain("a").closed
    assert closed
    assert {host.name for host in model.plan.hosts} - {*closed} == {
        host.name for host in model.smaller(frozenset(model.skipped("a"))).plan.hosts
    }
    for name, p in model.named_parameters():
        acts = name.startswith("bank.a") and not any(
            name.startswith(f"bank.a.adapters.{h.replace('.', '__').replace(':', '__call')}.")
            for h in closed
        )
        assert p.requires_grad == acts, name
    model.domain("a").requires_grad_(False)
    model.set_domain("a")
    score(model.train()(images())).backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.domain("a").parameters())


def flops(model, x, name):
    model.set_domain(name)
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        model.eval()(x)
    return counted.get_total_flops()


def test_less_is_computed_and_kept_and_the_share_is_that_of_what_runs():
    model, x = converted("a", "b"), images(8)
    model.skip("a", BRANCHES)
    alone = flops(model, x, None)
    share = model.plan.executed_share(BRANCHES)
    gone = 2 * len(x) * sum(b.macs for b in model.plan.branches if b.name in BRANCHES)
    assert gone == pytest.approx((1 - share) * alone, rel=1e-2)
    assert flops(model, x, "b") - flops(model, x, "a") > gone  # and adapters
    outputs(model, "a")
    assert float(model.executed_flops_fraction) == pytest.approx(share)
    kept = {}
    for name in "ab":
        model.set_domain(name)
        kept[name] = saved_activation_bytes(model.train(), x)
    assert kept["a"] < 0.6 * kept["b"]


def test_names_and_what_is_said():
    model = converted("a", make=tokens)
    names = [b.name for b in model.plan.branches]
    assert names == ["blocks.0", "blocks.0:2", "blocks.1", "blocks.1:2"]
    share = model.plan.executed_share(names)
    assert f"4 branches can be skipped, {1 - share:.0%} of the network's FLOPs" in str(model.plan)
    model.skip("a", [names[3], names[0], names[3]])
    assert model.skipped("a") == (names[0], names[3])


def test_the_status_counts_what_trains_and_names_the_share():
    model = converted("a", "b")
    model.set_domain("a")
    before = model.status()
    assert before.shares == {}
    branch = model.plan.branches[-1].name
    model.skip("a", [branch])
    status = model.status()
    assert status.shares == {"a": model.plan.executed_share([branch])}
    assert status.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert status.trained < before.trained
    assert f"{status.shares['a']:.0%} of the FLOPs, head" in str(status)
    assert status.to_dict()["shares"] == status.shares


def test_others_stay_as_they_are_bit_for_bit():
    model = converted("a", "b")
    before = {name: outputs(model, name) for name in (None, "a", "b")}
    model.skip("a", BRANCHES)
    for name in (None, "b"):
        assert torch.equal(outputs(model, name), before[name])
    with model.disable_adapters():
        assert torch.equal(outputs(model, None), before[None])
    assert not torch.equal(outputs(model, "a"), before["a"])
    model.skip("a", [])
    assert torch.equal(outputs(model, "a"), before["a"])
    assert not model.methods.smaller


def test_switching_an_active_domain_and_gates_beside():
    model = converted("a", gate=GateConfig(0.5, by="cell"))
    model.set_domain("a")
    model.eval()
    whole = model(images())
    model.skip("a", BRANCHES)
    assert not torch.equal(model(images()), whole)
    assert {*model.gate_maps(images())} == {"blocks.1.conv1", "blocks.1.conv2", "stem.0"}
    assert 0 < float(model.executed_flops_fraction) <= 1
    model.train().set_progress(0.5)
    score(model(images())).backward()
    closed = model.domain("a").adapter("blocks.0.conv1")
    assert all(p.grad is None for p in closed.parameters())


def test_other_methods_skip_too():
    model, other = pair("post, two")
    x = images()
    model.eval(), other.eval()
    assert torch.equal(model.network.features(x), other.network.features(x))
    whole = converted("a")
    whole.set_domain("a")
    assert not torch.equal(whole.eval().network.features(x), model.network.features(x))
    stem = model.network.stem(x)
    assert torch.equal(model.network.blocks[0](stem), stem)  # an activation twice


def test_copies_files_and_state_dicts_skip_alike(tmp_path):
    model = converted("a", "b")
    model.skip("a", BRANCHES)
    want = {name: outputs(model, name) for name in "ab"}
    model.save_domain("a", tmp_path / "a.safetensors")
    fresh = convert(network(), model.config)
    fresh.load_domain(tmp_path / "a.safetensors", "c")
    assert fresh.skipped("c") == tuple(BRANCHES)
    assert torch.equal(outputs(fresh, "c"), want["a"])
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("backbone.")}
    loaded = convert(network(), model.config)
    loaded.add_domain("b", 3)
    loaded.skip("b", ["blocks.1"])  # of which the state knows nothing
    loaded.load_state_dict(state)
    for other in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert (other.skipped("a"), other.skipped("b")) == (tuple(BRANCHES), ())
        for name in "ab":
            assert torch.equal(outputs(other, name), want[name])


def test_what_another_network_lacks_is_refused(tmp_path):
    model = converted("a")
    model.skip("a", BRANCHES)
    state = model.state_dict()
    other = converted("a")
    before = outputs(other, "a")
    state["_extra_state"]["skipped"]["a"] = ["blocks.7"]
    with refused(CheckpointError, "cannot skip ['blocks.7']", "'blocks.0', 'blocks.1'"):
        other.load_state_dict(state)
    model.domain("a").skipped = ("layer9",)
    model.save_domain("a", tmp_path / "a.safetensors")
    with refused(CheckpointError, "does not fit", "cannot skip ['layer9']"):
        other.load_domain(tmp_path / "a.safetensors", "c")
    assert other.domains == ["a"]
    assert torch.equal(outputs(other, "a"), before)


def test_bad_names_are_refused():
    model = converted("a")
    with refused(ConfigError, "cannot skip ['blocks.9', 'fc']", "It can skip ['blocks.0',"):
        model.skip("a", ["fc", "blocks.9", "blocks.1"])
    for wrong in ("blocks.1", None, [1], {"blocks.1": 1}):
        with refused(ConfigError, "`branches` must be a list of names"):
            model.skip("a", wrong)
    assert model.skipped("a") == ()
    model.original.network = None
    with refused(DA3Error, "a model that was saved forgets the network"):
        model.skip("a", BRANCHES)


def test_mixed_batches_are_computed_in_groups():
    model, x = converted("a", "b", "c", "d").eval(), images(6)
    model.skip("a", BRANCHES)
    model.skip("c", ["blocks.1"])
    model.skip("d", BRANCHES)
    names = ["b", "a", "c", None, "d", "a"]
    got = model(x, domains=names)
    share, shares = float(model.executed_flops_fraction), []
    for sample, name, y in zip(x, names, got, strict=True):
        torch.testing.assert_close(y, outputs(model, name, sample[None])[0], rtol=1e-4, atol=1e-5)
        own = model.executed_flops_fraction
        shares.append(1.0 if own is None else float(own))
    assert share == pytest.approx(sum(shares) / 6)
    assert 0 < share < 1
    for name in "abcd":
        model.fit_statistics(name, [x])
    nearest = model.nearest_domains(x)
    for y, z in zip(model(x, domains="nearest"), model(x, domains=nearest), strict=True):
        assert torch.equal(y, z)


@pytest.mark.parametrize("kind", ["post", "scaled"])
def test_compiled(kind):
    model, _ = pair(kind)
    x = images()
    want, gradient = gradients(model, x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled.eval()(x), model.eval()(x), rtol=1e-5, atol=1e-6)
    loss = score(compiled.train()(x))
    torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-5)
    loss.backward()
    for name, p in model.domain("a").named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, gradient[name], rtol=1e-3, atol=1e-4)


def test_exported_by_torch():
    model, _ = pair("post")
    model.eval()
    whole = converted("a").eval()
    whole.set_domain("a")
    programs = [torch.export.export(m, (images(),)) for m in (model, whole)]
    assert torch.equal(programs[0].module()(images()), model(images()))
    nodes = [[n for n in p.graph.nodes if n.op == "call_function"] for p in programs]
    assert len(nodes[0]) < 0.8 * len(nodes[1])


def test_predictions_are_of_what_runs():
    model, x = converted("a", "b", exact=True), images(8)
    model.skip("a", BRANCHES)
    found = {}
    for name in "ab":
        model.set_domain(name)
        model.train()
        kept = saved_activation_bytes(model, x)
        found[name] = step_costs(model, inputs=x)
        assert 0 <= found[name].ours.saved_activation_bytes - kept < 400  # of the loss
    assert found["a"].ours.peak_bytes < found["b"].ours.peak_bytes
    assert found["a"].ours.flops_forward < found["b"].ours.flops_forward
    assert "blocks.1.conv1" in str(found["a"])
    assert "blocks.0.conv1" not in str(found["a"])


def test_budgets_hold_for_what_runs():
    model, x = converted("a", "b", exact=True), images(8)
    model.skip("a", BRANCHES)
    peaks = {}
    for name in "ab":
        model.set_domain(name)
        peaks[name] = step_costs(model.train(), inputs=x).ours.peak_bytes
    model.budget_policy.hold(MemoryConfig(budget=int((peaks["a"] * 1.2 + peaks["b"]) / 2)))
    want = {}
    for name in "ab":
        model.set_domain(name)
        score(model.train()(x)).backward()
        want[name] = model.budget_policy.predicted.peak_bytes
    assert want["a"] <= peaks["a"] < peaks["b"]
    model.set_domain("a")
    model(x)
    taken = measure_step(lambda: score(model(x)).backward(), repeats=0).peak_bytes
    assert taken < peaks["b"]


def test_moved_and_cast_it_follows():
    model = converted("a", make=scaled).eval()
    model.skip("a", ["blocks.1"])
    want = outputs(model, "a")
    model.double()
    model.set_domain("a")
    torch.testing.assert_close(model(images().double()).float(), want, rtol=1e-4, atol=1e-5)
    state = model.state_dict()
    model.load_state_dict({k: v * 0 if "blocks.2.narrow" in k else v for k, v in state.items()})
    assert not torch.equal(model(images().double()).float(), want)
    noise = Noise(4)  # without gates nothing draws
    x = images().double()
    assert torch.equal(model.run_noisy("a", noise, x)[0], model(x))
