"""What a device needs runs where PyTorch cannot be imported."""

import subprocess
import sys

import pytest

BLOCK = """
import sys

class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "lightning", "safetensors"):
            raise ImportError(f"no {name} here")

sys.meta_path.insert(0, Refused())
"""


def run(code, *arguments):
    found = subprocess.run(
        [sys.executable, "-c", BLOCK + code, *arguments], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_the_package_says_what_its_names_need():
    code = """
import lightning_da3
from lightning_da3 import CheckpointError, device
assert lightning_da3.CheckpointError is CheckpointError and not hasattr(lightning_da3, "nothing")
try:
    from lightning_da3 import convert
except ImportError as error:
    print(error)
assert "torch" not in sys.modules
"""
    said = run(code)
    for part in ("`lightning_da3.convert` needs PyTorch", "no torch here", "lightning_da3.device"):
        assert part in said


def test_it_learns_and_saves(tmp_path):
    pytest.importorskip("onnxruntime")
    exported = pytest.importorskip("helpers.exported")
    path = exported.training_file(tmp_path / "step.onnx", accumulate=True)
    code = """
import numpy as np
from lightning_da3.device import Learner
learner = Learner(sys.argv[1], seed=0)
numbers = np.random.default_rng(0)
learner.fit(numbers.random((8, 4)), numbers.integers(3, size=8), epochs=1, batch_size=4)
learner.save(sys.argv[2])
print(sorted({name.split(".")[0] for name in sys.modules} & {"torch", "lightning", "safetensors"}))
"""
    assert run(code, str(path), str(tmp_path / "a.safetensors")) == "[]\n"
    from lightning_da3.files.domain_file import read_domain

    assert read_domain(tmp_path / "a.safetensors").metadata["domain"] == "a"
