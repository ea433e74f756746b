"""A device computes with the domain that it is given."""

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from helpers.domains import refused
from helpers.exported import inference_file, learnable, start, training_file, write_start

from lightning_da3.device import Predictor
from lightning_da3.errors import CheckpointError, DomainError, InputError


def scores(tensors, x):
    return x @ tensors["head.weight"].T + tensors["head.bias"]


def test_one_file_serves_all_domains(tmp_path):
    file = inference_file(tmp_path / "any.onnx")
    predictor, x = Predictor(file), learnable(5)[0]
    with refused(DomainError, "`load_domain` first"):
        predictor.predict(x)
    for seed, name in enumerate("ab"):
        path = write_start(tmp_path / f"{name}.safetensors", start(seed), domain=name)
        assert predictor.load_domain(path) == name
        np.testing.assert_allclose(predictor.predict(x), scores(start(seed), x), rtol=1e-5)
    np.testing.assert_allclose(predictor.predict(x, batch_size=2), scores(start(1), x), rtol=1e-5)
    with refused(CheckpointError, "of another architecture"):
        predictor.load_domain(write_start(path, architecture="e" * 64))
    np.testing.assert_allclose(predictor.predict(x), scores(start(1), x), rtol=1e-5)


def test_samples_in_fixed_numbers(tmp_path):
    file = inference_file(tmp_path / "a.onnx", batch=2)
    predictor = Predictor(file, write_start(tmp_path / "a.safetensors"))
    x = learnable(6)[0]
    np.testing.assert_allclose(predictor.predict(x), scores(start(), x), rtol=1e-5)
    with refused(InputError, "takes 2 samples at once, got 5"):
        predictor.predict(x[:5])
    with refused(InputError, "`batch_size` must be an int"):
        predictor.predict(x, batch_size=0)


def test_a_training_file_is_refused(tmp_path):
    with refused(CheckpointError, "is for training", "`model.export(...)` wrote"):
        Predictor(training_file(tmp_path / "step.onnx"))
