"""A device learns with arrays alone, and what it saves is a domain's file."""

import sys

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from helpers.domains import refused
from helpers.exported import (
    CLASSES,
    FEATURES,
    inference_file,
    learnable,
    start,
    training_file,
    write_start,
)

from lightning_da3.device import Learner
from lightning_da3.errors import CheckpointError, DA3Error, DomainError, InputError
from lightning_da3.files.content import read_content
from lightning_da3.schedule import annealed_target


@pytest.fixture
def step_file(tmp_path):
    return training_file(tmp_path / "step.onnx")


def by_hand(tensors, x, labels, rate):
    """One step of SGD in numpy."""
    scores = x @ tensors["head.weight"].T + tensors["head.bias"]
    chances = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    loss = -np.log(chances[np.arange(len(x)), labels]).mean()
    slope = (chances - np.eye(CLASSES)[labels]) / len(x)
    grads = {"head.weight": slope.T @ x, "head.bias": slope.sum(0)}
    return loss, {n: tensors[n] - rate * grads[n] for n in tensors}


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-6)


def test_a_step(step_file):
    learner, (x, labels) = Learner(step_file), learnable(6)
    assert_close(learner.tensors, start())
    loss, expected = by_hand(start(), x, labels, 0.5)
    assert learner.step(x, labels, 0.5) == pytest.approx(loss, rel=1e-5)
    assert_close(learner.tensors, expected)
    assert (learner.steps, learner.domain, learner.accumulates) == (1, "a", False)


def test_it_learns_predicts_and_saves(step_file, tmp_path):
    inference = inference_file(tmp_path / "inference.onnx")
    learner = Learner(step_file, inference=inference, seed=0)
    x, labels = learnable(50)
    losses = learner.fit(x, labels, epochs=8, batch_size=16, learning_rate=1.0)
    assert len(losses) == 8
    assert losses[-1] < losses[0] / 2
    assert learner.steps == 8 * 4  # the last batch has two samples
    test, expected = learnable(40, seed=1)
    assert (learner.predict(test, batch_size=7).argmax(1) == expected).mean() > 0.9
    learner.save(tmp_path / "a.safetensors", accuracy=0.9)
    file = read_content(tmp_path / "a.safetensors")
    assert file.metadata["extra"] == {"accuracy": 0.9}
    for name, array in learner.tensors.items():
        np.testing.assert_array_equal(file.tensors[name].array, array)
    again = Learner(step_file, tmp_path / "a.safetensors", inference)
    np.testing.assert_array_equal(again.predict(test), learner.predict(test))


def test_the_seed_says_what_is_learned(step_file):
    runs = [Learner(step_file, seed=3) for _ in range(2)]
    for learner in runs:
        learner.fit(*learnable(20), epochs=2, batch_size=8)
    for name, array in runs[0].tensors.items():
        np.testing.assert_array_equal(array, runs[1].tensors[name])


@pytest.mark.parametrize(("batch", "part_size"), [("batch", 1), ("batch", 4), (2, 1)])
def test_parts_of_a_batch_add_up(tmp_path, batch, part_size):
    file = training_file(tmp_path / "step.onnx", batch=batch, accumulate=True)
    learner, tensors = Learner(file, part_size=part_size), start()
    assert learner.accumulates
    for seed in range(3):
        x, labels = learnable(10, seed)
        loss, tensors = by_hand(tensors, x, labels, 0.5)
        assert learner.step(x, labels, 0.5) == pytest.approx(loss, rel=1e-5)
        assert_close(learner.tensors, tensors)


def test_what_a_domain_has_beside_its_parameters_stays(step_file, tmp_path):
    beside = {"statistics.mean": np.ones(5), "narrow": np.float16([2])}
    domain = write_start(tmp_path / "b.safetensors", {**start(1), **beside}, domain="b")
    learner = Learner(step_file, domain)
    learner.step(*learnable(4), 0.1)
    learner.save(domain)
    file = read_content(domain)
    assert (learner.domain, file.metadata["domain"]) == ("b", "b")
    for name, array in beside.items():
        np.testing.assert_array_equal(file.tensors[name].array, array)


def fed(learner, monkeypatch):
    """Everything that goes in, from now on."""
    calls, run = [], learner.session.run
    monkeypatch.setattr(learner.session, "run", lambda given: (calls.append(given), run(given))[1])
    return calls


def test_gates_go_as_in_a_trainer(step_file, monkeypatch):
    learner = Learner(step_file, seed=0)
    calls, seen = fed(learner, monkeypatch), []

    def rate(progress):
        seen.append(progress)
        return 0.1

    learner.fit(*learnable(20), epochs=5, batch_size=10, learning_rate=rate)
    assert seen == pytest.approx([i / 10 for i in range(10)])
    targets = [float(call["gate_target"]) for call in calls]
    assert targets == pytest.approx([annealed_target(0.4, p) for p in seen])
    noisy = [bool(call["noise"].any()) for call in calls]
    assert noisy == [True] * 8 + [False] * 2
    noise = np.concatenate([call["noise"] for call in calls[:8]])
    assert noise.std() == pytest.approx(np.pi / np.sqrt(3), rel=0.2)  # of logistic noise
    assert np.unique(noise).size == noise.size
    learner.step(*learnable(3), 0.1)  # as a model without a Trainer: all the way there
    assert float(calls[-1]["gate_target"]) == pytest.approx(0.4)
    assert not calls[-1]["noise"].any()


def test_samples_in_fixed_numbers(tmp_path):
    learner = Learner(training_file(tmp_path / "step.onnx", batch=4, gates=False))
    learner.fit(*learnable(10), epochs=2, batch_size=4)
    assert learner.steps == 4  # two samples are left out each time
    with refused(InputError, "takes batches of 4, got 8", "dynamic_batch=True"):
        learner.step(*learnable(8), 0.1)
    with refused(InputError, "takes 4 samples at once, got 6"):
        learner.step(*learnable(6), 0.1)
    with refused(InputError, "There are 3 samples"):
        learner.fit(*learnable(3), epochs=1)


def test_bad_batches_change_nothing(step_file):
    learner, (x, labels) = Learner(step_file), learnable(4)

    def step(images=x, targets=labels, rate=0.1, **said):
        learner.step(images, targets, rate, **said)

    with refused(InputError, f"shape (N, {FEATURES})", "got (4, 3)"):
        step(x[:, :3])
    with refused(InputError, "at least one sample", "got (0, 4)"):
        step(x[:0], labels[:0])
    with refused(InputError, "`images` must be of float32, got uint8"):
        step(x.astype(np.uint8))
    with refused(InputError, "takes 1 arrays, got 2"):
        step((x, x))
    with refused(InputError, "`targets` must have the shape (4)", "got (3,)"):
        step(targets=labels[:3])
    with refused(InputError, "`targets` must be of int64, got float64"):
        step(targets=labels / 2)
    with refused(InputError, "classes from 0 to 2", "[-1, 3]"):
        step(targets=[0, 3, -1, 1])
    for rate in (-1.0, float("nan"), float("inf"), "fast", None):
        with refused(InputError, "`learning_rate` must be a finite number of at least 0"):
            step(rate=rate)
    with refused(InputError, "`progress` must be", "at most 1, got 2"):
        step(progress=2)
    with refused(InputError, "The loss of step 1 is nan", "was not made"):
        step(np.full_like(x, np.nan))
    for said in ({"epochs": 0}, {"epochs": True}, {"epochs": 1, "batch_size": 0}):
        with refused(InputError, "must be an int of at least 1"):
            learner.fit(x, labels, **said)
    with refused(DomainError, "does not predict", "domains='inputs'"):
        learner.predict(x)
    assert_close(learner.tensors, start())
    assert learner.steps == 0


def test_targets_that_the_loss_ignores(tmp_path):
    Learner(training_file(tmp_path / "step.onnx")).step(learnable(2)[0], [1, -100], 0.1)
    adds_up = Learner(training_file(tmp_path / "adds_up.onnx", accumulate=True))
    with refused(InputError, "classes from 0 to 2", "[-100]"):  # a mean over other samples
        adds_up.step(learnable(2)[0], [1, -100], 0.1)


def test_a_file_that_is_none(step_file, tmp_path):
    with refused(CheckpointError, "Cannot read the exported file", "there is none"):
        Learner(tmp_path / "nothing.onnx")
    with refused(CheckpointError, "it is a folder"):
        Learner(tmp_path)
    (tmp_path / "noise.onnx").write_bytes(b"noise")
    with refused(CheckpointError, "cannot open", "format='onnx'"):
        Learner(tmp_path / "noise.onnx")
    with refused(CheckpointError, "is for inference, and one for training is needed"):
        Learner(inference_file(tmp_path / "inference.onnx"))
    with refused(CheckpointError, "format version 9", "Upgrade"):
        Learner(training_file(tmp_path / "new.onnx", format_version=9))
    with refused(InputError, "`part_size` must be an int"):
        Learner(step_file, part_size=0)


def test_a_domain_that_does_not_fit(step_file, tmp_path):
    path = tmp_path / "b.safetensors"

    def learn(tensors=None, **about):
        Learner(step_file, write_start(path, tensors, **about))

    with refused(CheckpointError, "does not fit", "of another backbone", "eeeeeeeeeeee"):
        learn(backbone="e" * 64)
    with refused(CheckpointError, "another version of lightning_da3"):
        learn(config={"version": 1, "adapter": {}, "gate": {"target": 0.4}, "head": "auto"})
    with refused(CheckpointError, "Its config has gate=None"):
        learn(config={"version": 2, "adapter": {}, "gate": None, "head": "auto"})
    with refused(CheckpointError, "It lacks ['head.bias']"):
        learn({"head.weight": start()["head.weight"]})
    with refused(CheckpointError, "'head.bias' has the shape (5,)", "not (3,)"):
        learn({**start(), "head.bias": np.zeros(5, np.float32)})
    with refused(CheckpointError, "is of float64"):
        learn({**start(), "head.bias": np.zeros(3)})
    path.write_bytes(path.read_bytes()[:-1])
    with refused(CheckpointError, "Cannot read the domain file"):
        Learner(step_file, path)
    step_file.with_name("step.onnx.safetensors").unlink()
    with refused(CheckpointError, "Cannot read the domain file", "No such file"):
        Learner(step_file)


def test_an_inference_file_that_does_not_fit(step_file, tmp_path):
    other = inference_file(tmp_path / "other.onnx", plan="e" * 64)
    with refused(CheckpointError, "are of two models", "another plan"):
        Learner(step_file, inference=other)


class Stopped(Exception):  # noqa: N818
    """As if the power went."""


@pytest.mark.parametrize("accumulate", [False, True])
def test_a_fit_that_was_stopped_goes_on_as_if_it_had_not(tmp_path, accumulate):
    step_file = training_file(tmp_path / "step.onnx", accumulate=accumulate)
    path = tmp_path / "fit.safetensors"
    about = {"epochs": 5, "batch_size": 8, "checkpoint": path}
    whole = Learner(step_file, seed=3)
    losses = whole.fit(*learnable(20), epochs=5, batch_size=8, learning_rate=0.5)

    def until(progress):
        if progress >= 0.5:  # in the third epoch
            raise Stopped
        return 0.5

    with pytest.raises(Stopped):
        Learner(step_file, seed=3).fit(*learnable(20), **about, learning_rate=until)
    again = Learner(step_file, seed=4)
    assert again.fit(*learnable(20), **about, learning_rate=0.5) == losses
    assert again.steps == whole.steps == 15
    for name, array in whole.tensors.items():
        np.testing.assert_array_equal(again.tensors[name], array)
    finished = Learner(step_file)  # nothing is left to do
    assert finished.fit(*learnable(20), **about, learning_rate=until) == losses
    np.testing.assert_array_equal(finished.tensors["head.bias"], whole.tensors["head.bias"])


def test_a_checkpoint_is_of_one_fit_and_no_domain(step_file, tmp_path):
    path = tmp_path / "fit.safetensors"
    learner = Learner(step_file)
    learner.fit(*learnable(20), epochs=1, checkpoint=path)
    with refused(CheckpointError, "of another fit", "epochs=1", "samples=20; now", "samples=12"):
        learner.fit(*learnable(12), epochs=2, checkpoint=path)
    with refused(CheckpointError, "is no domain file", "checkpoint"):
        Learner(step_file, path)
    domain = write_start(tmp_path / "a.safetensors")
    with refused(CheckpointError, "is no checkpoint of a fit"):
        learner.fit(*learnable(20), epochs=1, checkpoint=domain)
    with refused(CheckpointError, "Cannot write"):
        learner.fit(*learnable(20), epochs=1, checkpoint=tmp_path / "nowhere" / "fit.safetensors")


def test_what_cannot_be_saved_leaves_the_file(step_file, tmp_path):
    learner, path = Learner(step_file), write_start(tmp_path / "a.safetensors")
    before = path.read_bytes()
    with refused(CheckpointError, "the metadata is not JSON"):
        learner.save(path, worst=float("nan"))
    x, labels = learnable(4)
    learner.step(100 * x, labels, 1e38)
    with refused(CheckpointError, "NaN or infinite values", "the last good file is kept"):
        learner.save(path)
    assert path.read_bytes() == before
    with refused(CheckpointError, "Cannot write the domain file"):
        learner.save(tmp_path / "nowhere" / "a.safetensors")


def test_without_the_runtime(step_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with refused(DA3Error, "pip install onnxruntime"):
        Learner(step_file)
