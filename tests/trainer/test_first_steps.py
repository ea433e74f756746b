"""What a callback says of its first steps: measured, predicted, and when both differ."""

import copy
import dataclasses
import pickle
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers.lit import CONFIG, Lit, callback, data, lit, network, trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_da3 import (
    DA3Callback,
    DA3Config,
    GateConfig,
    MemoryConfig,
    PredictionWarning,
    convert,
)
from lightning_da3.memory import resident_bytes
from lightning_da3.trainer import first_steps
from lightning_da3.trainer.first_steps import FirstSteps

SPARE = 8 * 2**20  # bytes beside the network


def wide():
    """A module whose network is large enough for kernels' own memory not to matter."""
    module = Lit("elsewhere")
    module.net = pytest.importorskip("torchvision").models.resnet18(num_classes=5)
    return module


def images(count=24, size=64):
    return TensorDataset(torch.rand(count, 3, size, size), torch.ones(count).long())


def fit(tmp_path, module, loader=None, da3=None, **kwargs):
    da3 = da3 or callback()
    fitter = trainer(tmp_path, da3, **kwargs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fitter.fit(module, loader or data())
    said = [str(w.message) for w in caught if w.category is PredictionWarning]
    return da3.first_steps, fitter.callback_metrics, said


@pytest.mark.slow
def test_what_is_predicted_is_what_is_measured(tmp_path):
    steps, logged, said = fit(tmp_path, wide(), DataLoader(images(), 8), DA3Callback("a", 2))
    assert logged["da3/peak_bytes"] == steps.peak_bytes
    assert logged["da3/predicted_peak_bytes"] == steps.predicted.peak_bytes
    assert steps.predicted.peak_bytes == pytest.approx(steps.peak_bytes, rel=0.1)
    kept = steps.predicted.saved_activation_bytes
    assert steps.saved_activation_bytes == pytest.approx(kept, rel=0.01)
    assert sum(steps.saved_by_module.values()) == steps.saved_activation_bytes
    assert said == []


class Wasteful(Lit):
    """Needs memory beside the network."""

    def training_step(self, batch, batch_idx):
        torch.empty(SPARE // 4).fill_(1.0)
        return super().training_step(batch, batch_idx)


def test_a_peak_that_was_not_predicted_is_told_once(tmp_path):
    steps, _, said = fit(tmp_path, Wasteful(), epochs=3)
    assert len(said) == 1
    assert "peaked at 8.0 MiB above its start; 0.1 MiB were predicted" in said[0]
    assert steps.surprising


def test_a_small_difference_is_no_surprise(tmp_path, monkeypatch):
    monkeypatch.setattr(first_steps, "OFF_BY_BYTES", SPARE)
    assert fit(tmp_path, Wasteful())[2] == []


@pytest.mark.slow
def test_another_batch_than_the_predicted_is_no_surprise(tmp_path):
    loader = DataLoader(images(), batch_sampler=[list(range(23)), [23]])
    steps, _, said = fit(tmp_path, wide(), loader)
    assert steps.predicted.peak_bytes > 2 * steps.peak_bytes + first_steps.OFF_BY_BYTES
    assert said == []


class Twice(Lit):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y) + F.cross_entropy(self.net(x + 1), y)


class DecidesByValues(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = network()

    def forward(self, x):
        return self.parts(x if float(x.sum()) > 0 else -x)


def decides_by_values():
    module = Lit("elsewhere")
    module.net = DecidesByValues()
    return module, DA3Callback("a", config=dataclasses.replace(CONFIG, head=None))


def called_twice():
    return Twice(), callback()


@pytest.mark.parametrize("make", [called_twice, decides_by_values])
def test_what_cannot_be_predicted_is_left_out(tmp_path, make):
    module, da3 = make()
    steps, logged, said = fit(tmp_path, module, da3=da3)
    assert steps.predicted is None
    assert "da3/predicted_peak_bytes" not in logged
    assert logged["da3/peak_bytes"] > 0
    assert said == []


def test_nothing_is_predicted_if_nobody_wants_to_know(tmp_path):
    steps, logged, _ = fit(tmp_path, lit(), da3=callback(predict=False))
    assert steps.predicted is None
    assert logged["da3/peak_bytes"] > 0


def test_a_prediction_changes_nothing(tmp_path):
    def learned(predict):
        torch.manual_seed(0)
        module = lit()
        fit(tmp_path, module, da3=callback(predict=predict))
        return module.net.domain("a").state_dict()

    with_it, without = learned(True), learned(False)
    for name, value in with_it.items():
        assert torch.equal(value, without[name]), name


@pytest.mark.skipif(
    "AVX512" not in torch.backends.cpu.get_cpu_capability(),
    reason="without AVX512 convolutions in bfloat16 take other memory than is known",
)
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize(("exact", "most"), [(True, 0.7), (False, 1)])  # the rest is codes
def test_lower_precision_is_predicted_as_such(tmp_path, precision, exact, most):
    config = DA3Config(gate=GateConfig(target=0.5, by="cell"), memory=MemoryConfig(exact=exact))

    def steps_of(**kwargs):
        learner = DA3Callback("a", 2, config=config)
        return fit(tmp_path, wide(), DataLoader(images(), 8), learner, **kwargs)[0]

    steps, whole = steps_of(precision=precision), steps_of()
    kept = steps.predicted.saved_activation_bytes
    assert kept == pytest.approx(steps.saved_activation_bytes, rel=0.01)
    assert kept < most * whole.predicted.saved_activation_bytes
    assert steps.predicted.peak_bytes == pytest.approx(steps.peak_bytes, rel=0.1)


def test_only_calls_with_a_graph_count():
    model = convert(network(), CONFIG)
    model.add_domain("a", 2)
    model.set_domain("a")
    steps, x = FirstSteps(model), torch.rand(2, 3, 16, 16)
    for _ in range(2):
        steps.begin(model, x, peak_on=torch.device("cpu"))
        with torch.no_grad():
            model(x[:1])  # someone looks
        loss = model(x).sum()
        steps.forward_ended()
        loss.backward()
        steps.end()
    assert steps.predicted is not None
    assert not model._forward_pre_hooks


def test_a_compiled_network_is_left_alone():
    model = convert(network(), CONFIG)
    model.compile()
    steps = FirstSteps(model)
    steps.begin(model, (), peak_on=None)
    assert not model._forward_pre_hooks
    steps.abort()


def test_copies_leave_the_network_behind(tmp_path):
    steps, *_ = fit(tmp_path, lit())
    for again in (pickle.loads(pickle.dumps(steps)), copy.deepcopy(steps)):
        assert again.predicted == steps.predicted
        assert again.peak_bytes == steps.peak_bytes
    model = convert(network(), CONFIG)
    begun = FirstSteps(model)
    assert copy.deepcopy(begun)._network is None


def test_the_resident_set_is_logged(tmp_path):
    if resident_bytes() is None:
        pytest.skip("the system does not tell")
    assert 2**20 < resident_bytes() < 2**40
    before = resident_bytes()
    _, logged, _ = fit(tmp_path, lit())
    assert before <= logged["da3/resident_bytes"] <= resident_bytes()


@pytest.mark.slow
def test_the_resident_set_grows_with_what_is_touched():
    before = resident_bytes()
    if before is None:
        pytest.skip("the system does not tell")
    torch.ones(before // 4)  # bytes: as much again
    assert resident_bytes() > 1.5 * before


def test_where_nobody_tells_there_is_no_resident_set(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    assert resident_bytes() is None
    assert "da3/resident_bytes" not in fit(tmp_path, lit())[1]
