"""The step as a program in C++ runs it, where a compiler and the headers of ONNX Runtime are."""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnxruntime
from helpers.examples import EXAMPLES
from helpers.exported import learnable, training_file
from safetensors.numpy import load_file

from lightning_da3.device import Learner

HEADER = "onnxruntime_c_api.h"
PLACES = ("/usr/include/onnxruntime", "/usr/local/include/onnxruntime", "/usr/local/include")


def headers():
    """The folder of the headers, in one of the usual places or in $ONNXRUNTIME_INCLUDE."""
    told = [os.environ[name] for name in ("ONNXRUNTIME_INCLUDE",) if name in os.environ]
    found = [place for place in (*told, *PLACES) if (Path(place) / HEADER).exists()]
    return found[0] if found else pytest.skip(f"no {HEADER}: set ONNXRUNTIME_INCLUDE")


@pytest.fixture
def program(tmp_path):
    """The example, compiled, and linked to the library that is in the Python package."""
    compiler = shutil.which("g++") or pytest.skip("no g++")
    folder = headers()
    libraries = sorted((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))
    if not libraries:
        pytest.skip("the package has no library to link to")
    library = tmp_path / "libonnxruntime.so.1"
    library.symlink_to(libraries[0])
    command = [compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror", str(EXAMPLES / "learn.cpp")]
    command += [
        f"-I{folder}",
        str(library),
        f"-Wl,-rpath,{tmp_path}",
        "-o",
        str(tmp_path / "learn"),
    ]
    subprocess.run(command, check=True)
    return tmp_path / "learn"


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [False, True])
def test_a_program_in_cpp_learns_the_same(program, tmp_path, accumulate):
    path, (x, labels) = training_file(tmp_path / "a.onnx", accumulate=accumulate), learnable(12)
    x.tofile(tmp_path / "images.bin")
    labels.astype(np.int64).tofile(tmp_path / "targets.bin")
    words = [path, tmp_path / "images.bin", tmp_path / "targets.bin", "5", "0.5", "0.4"]
    run = [str(word) for word in (program, *words, tmp_path / "learned.safetensors")]
    said = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    learner = Learner(path, part_size=12)
    losses = [learner.step(x, labels, 0.5) for _ in range(5)]
    assert [float(line) for line in said.split()] == pytest.approx(losses, abs=1e-5)
    learned = load_file(tmp_path / "learned.safetensors")
    for name, array in learner.tensors.items():
        np.testing.assert_allclose(learned[name], array, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_what_does_not_fit_ends_with_a_line(program, tmp_path):
    path = training_file(tmp_path / "a.onnx")
    np.zeros(5, np.float32).tofile(tmp_path / "images.bin")
    np.zeros(2, np.int64).tofile(tmp_path / "targets.bin")
    words = [path, tmp_path / "images.bin", tmp_path / "targets.bin", "5", "0.5", "0.4"]
    for more, why in (([], "MODEL IMAGES TARGETS"), ([tmp_path / "b"], "images do not fit")):
        run = [str(word) for word in (program, *words, *more)]
        ended = subprocess.run(run, capture_output=True, text=True)
        assert (ended.returncode, ended.stdout) == (1, "")
        assert ended.stderr.startswith("learn: ")
        assert why in ended.stderr
    assert not (tmp_path / "b").exists()
