"""Batches whose samples belong to different domains."""

import copy
import pickle

import pytest
import torch
from helpers.domains import refused
from helpers.mixed import MIX, apart, batch, learned

from lightning_da3 import (
    DomainError,
    InputError,
)
from lightning_da3.nn.frozen import FrozenConv


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("gate", [True, False], ids=["gates", "no gates"])
@pytest.mark.parametrize(
    "name",
    [
        *("Residual", "Depthwise", "ConvHead", "SharedConv", "OtherAxes", "DictOutput"),
        *("transformer", "Island", "Segmentation"),
    ],
)
def test_every_sample_gets_what_a_pass_of_its_own_gives(name, gate):
    model = learned(name, gate)
    x = batch()
    expected = apart(model, x, MIX)
    got = model(x, domains=MIX)
    assert isinstance(got, list)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    others = apart(model, x, ["a", "c", "a", None, None])
    for one, other in zip(expected, others, strict=True):  # or the domains would be one
        if isinstance(one, torch.Tensor):
            assert one.shape != other.shape or (one - other).abs().max() > 1e-2


def test_heads_may_be_alike_and_all_samples_of_one_domain():
    model = learned(classes={"a": 4, "b": 4})
    x = batch()
    for names in (["a"] * 5, [None] * 5, ["b", "a", "b", "b", "a"]):
        torch.testing.assert_close(
            model(x, domains=names), apart(model, x, names), rtol=1e-4, atol=1e-5
        )
    assert model(x[:0], domains=[]) == []


def test_the_island_is_one():
    assert learned("Island").plan.python


def test_the_backbone_runs_once():
    model, sizes = learned(), []
    for layer in model.modules():
        if isinstance(layer, FrozenConv):
            layer.register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
    model(batch(), domains=MIX)
    assert sizes == [5] * 4


def test_the_executed_share_is_of_all_samples():
    model = learned()
    x, shares = batch(), []
    for sample, name in zip(x, MIX, strict=True):
        model.set_domain(name)
        model(sample[None])
        share = model.executed_flops_fraction
        shares.append(1.0 if share is None else share.item())
    assert len(set(shares)) > 2
    model(x, domains=MIX)
    assert model.executed_flops_fraction.item() == pytest.approx(sum(shares) / 5)


def test_batches_that_are_lists():
    model = learned("Lists")
    images = list(batch()[:2])
    both = [model(images, domains=[name] * 2) for name in "ab"]
    mixed = model(images, domains=["b", "a"])
    assert [entry["boxes"].shape for entry in mixed] == [(4, 4), (4, 5)]
    torch.testing.assert_close(mixed, [both[1][0], both[0][1]])
    assert (mixed[0]["boxes"] - both[0][0]["boxes"]).abs().max() > 1e-2


def test_under_autocast():
    model, x = learned(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(
            model(x, domains=MIX), apart(model, x, MIX), rtol=0.05, atol=0.05
        )


def test_by_keyword():
    model = learned("Keywords")
    x = batch()
    torch.testing.assert_close(model(x=x, domains=MIX), model(x, domains=MIX), rtol=0, atol=0)


@pytest.mark.parametrize("active", ["a", None])
def test_everything_stays_as_it_was(active):
    model, x = learned(), batch()
    model.set_domain(active)

    def now():
        trainable = {n for n, p in model.named_parameters() if p.requires_grad}
        with torch.no_grad():
            return model.active_domain, trainable, model(x)

    before = now()
    model(x, domains=MIX)
    with refused(DomainError, "no domain 'z'"):
        model(x, domains=["a", "z", "a", "a", "a"])
    after = now()
    assert after[:2] == before[:2]
    assert torch.equal(after[2], before[2])


def test_copies_and_inference_mode():
    model, x = learned(), batch()
    expected = model(x, domains=MIX)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.inference_mode():
            torch.testing.assert_close(other(x, domains=MIX), expected, rtol=0, atol=0)


def test_mixing_is_for_inference():
    model, x = learned(), batch()
    assert not any(scores.requires_grad for scores in model(x, domains=MIX))
    model.train()
    with refused(InputError, "`domains` is for inference", "`eval()`", "DomainLoader"):
        model(x, domains=MIX)
    with torch.no_grad():
        assert len(model(x, domains=MIX)) == 5


def test_domains_that_do_not_fit_the_batch_are_refused():
    model, x = learned(), batch()
    with refused(InputError, "`domains` has 2 entries and the batch 5 samples"):
        model(x, domains=["a", "b"])
    for wrong in ("a", 3):
        with refused(InputError, f"got {wrong!r}", "'nearest'", "set_domain(name)"):
            model(x, domains=wrong)
    with refused(InputError, "takes batches of shape"):
        model(x[0], domains=["a"] * 3)
    with refused(InputError, "must be a batch", "NoneType"):
        model(None, domains=["a"])


def test_samples_that_cannot_be_told_apart_are_refused(capfd):
    with refused(InputError, "names 5 samples, but 'conv' works on 10 at once", "set_domain"):
        learned("Crops")(batch(), domains=MIX)
    with refused(InputError, "returns (4,) for 5 samples"):
        learned("SumOfTheBatch")(batch(), domains=MIX)
    assert learned("Crops")(batch(), domains=["a"] * 5)[0].shape == ()  # one domain: all the same
    model = learned()
    model._slots.head.register_forward_hook(lambda _, __, scores: scores.flatten(0).view(5, 7, 1))
    with refused(InputError, "heads have [3, 4, 5, 7] classes", "no output"):
        model(batch(), domains=MIX)
    assert not capfd.readouterr().err
