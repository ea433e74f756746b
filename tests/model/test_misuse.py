"""Wrong arguments of a converted network: a sentence says what was given and what to do."""

import numpy as np
import pytest
import torch
from helpers.domains import refused
from helpers.learned import CONFIG, batch, converted
from torch import nn

from lightning_da3 import ConfigError, DomainError, InputError, accumulated, convert, step_costs

HUGE = 10**5000  # too long to be shown
NAN, INF = float("nan"), float("inf")


def kind(value):
    return type(value).__name__


@pytest.mark.parametrize(
    "value", [NAN, INF, -INF, -0.1, 1.01, "0.5", None, True, [], 10**400], ids=kind
)
def test_progress_is_a_share(value):
    model = converted("a")
    with refused(ConfigError, "`progress` must be a number in [0, 1]"):
        model.set_progress(value)
    assert model.progress == 1.0
    for fine in (0, 1, 0.5, np.float64(0.5)):
        model.set_progress(fine)


@pytest.mark.parametrize(
    "names", [5, 1.5, True, "abc", b"abc", {"x", "y", "z"}, {"x": 1}, iter("abc"), [1, 2, 3], [[]]]
)
def test_class_names_are_a_sequence_of_strings(names):
    model = converted()
    with refused(ConfigError, "`class_names` must be a sequence of str, got"):
        model.add_domain("a", 3, class_names=names)
    assert model.domains == []


def test_class_names_of_numpy():
    model = converted()
    model.add_domain("a", 3, class_names=np.array(["x", "y", "z"]))
    assert model.domain("a").class_names == ["x", "y", "z"]
    assert {type(name) for name in model.domain("a").class_names} == {str}
    with refused(ConfigError, "one name for each of the 2 classes, got 3"):
        model.add_domain("b", 2, class_names=("x", "y", "z"))


@pytest.mark.parametrize(
    "value", [0, -1, 1.0, NAN, INF, "3", "²", True, [3], 2**31, HUGE], ids=kind
)
def test_numbers_of_classes(value):
    model = converted()
    with refused(ConfigError, "`num_classes` must be"):
        model.add_domain("a", value)
    assert model.domains == []


@pytest.mark.parametrize("name", ["b", 5, [], {}, b"a", ("a",), NAN, HUGE, True], ids=kind)
def test_names_of_no_domain(name):
    model = converted("a")
    for take in (model.set_domain, model.domain, model.delete_domain):
        with refused(DomainError, "There is no domain", "There are ['a']"):
            take(name)
    with refused(DomainError, "There is no domain"):
        model.fit_statistics(name, [batch()])
    with refused(DomainError, "There is no domain"):
        model.eval()(batch(), domains=[name, "a"])


def test_samples_that_are_none():
    model = converted("a")
    for batches in (5, None, NAN, True):
        with refused(ConfigError, "`batches` must be a list or a loader of batches"):
            model.fit_statistics("a", batches)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_batches_of_another_type(dtype):
    model = converted("a")
    model.set_domain("a")
    x = batch().to(dtype)
    for run in (model, model.nearest_domains, model.gate_maps, model.eval()):
        if run == model.nearest_domains:
            model.fit_statistics("a", [batch()])
        with refused(InputError, "computes in torch.float32", "`batch.to(torch.float32)`"):
            run(x)
    model.train()
    y = model.to(dtype)(x) if dtype == torch.float64 else model.bfloat16()(x.bfloat16())
    assert y.isfinite().all()
    if dtype != torch.float64:
        with torch.autocast("cpu", dtype):
            assert converted("a").eval()(batch().to(dtype)).isfinite().all()


def test_errors_of_other_kinds_stay_pytorch_s_own():
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x):
            return self.fc(self.conv(x).view(len(x), 4))

    model = convert(Picky(), CONFIG)
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        model(torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize(
    "choices",
    [
        *({"batch_size": value} for value in (0, -1, 1.5, NAN, True, "2", None, 10**400)),
        *({"image_size": value} for value in (0, -1, 1.5, NAN, True, "32", [], [32, "32"], {32})),
        {"image_size": 2**40},
    ],
    ids=str,
)
def test_sizes_of_a_step(choices):
    with refused(ConfigError, "`batch_size` and `image_size` must be ints of at least 1, got"):
        step_costs(converted("a"), **choices)


@pytest.mark.parametrize("scale", [0, -1.0, NAN, INF, "1", None, True])
def test_scales_of_accumulated_steps(scale):
    with refused(ConfigError, "`scale` must be a finite number above 0"):
        accumulated(converted("a"), lambda part: part, (batch(),), scale=scale)


def test_training_without_an_active_domain_is_told_once():
    model = converted().train()
    model(batch())  # there is no domain yet
    model.add_domain("a", 3)
    with torch.no_grad():
        model(batch())
    model.eval()(batch())
    model(batch().requires_grad_())
    model.train()
    with pytest.warns(UserWarning, match=r"No domain is active.*\['a'\]: `set_domain") as told:
        loss = model(batch()).sum()
    assert told[0].filename == __file__
    with pytest.raises(RuntimeError, match="does not require grad"):
        loss.backward()
    model(batch())
    other = converted("a", "b").train()
    with other.disable_adapters():
        other(batch())  # as was asked for
    other.set_domain(None)
    other(batch())
