"""Tensors as bytes: numpy and PyTorch mean the same by them."""

import numpy as np
import pytest
import torch

from lightning_da3.errors import CheckpointError
from lightning_da3.files.content import read_content, write_content
from lightning_da3.files.domain_file import fingerprint, read_domain, write_domain
from lightning_da3.files.stored import KINDS, Stored, fingerprint_of

ARRAYS = {
    "bool": np.array([[True, False]]),
    "float16": np.float16([1.5, -2]),
    "float64": np.linspace(0, 1, 6).reshape(2, 3)[:, ::2],
    "int64": np.array(7),
    "big": np.arange(3, dtype=">i4"),
    "none": np.empty((0, 5), np.float32),
    "turned": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    "complex64": np.complex64([1 + 2j]),
}


def tensors():
    native = {name: x.astype(x.dtype.newbyteorder("=")) for name, x in ARRAYS.items()}
    return {name: torch.from_numpy(np.array(x)) for name, x in native.items()}


def test_arrays_and_tensors_have_one_fingerprint():
    pairs = ((name, Stored.of(ARRAYS[name])) for name in sorted(ARRAYS))
    assert fingerprint_of(pairs) == fingerprint(tensors())


def test_arrays_and_tensors_make_one_file(tmp_path):
    write_content(tmp_path / "a", [(n, Stored.of(x)) for n, x in ARRAYS.items()], {"x": 1})
    write_domain(tmp_path / "b", dict(reversed(tensors().items())), {"x": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    for name, tensor in read_domain(tmp_path / "a").tensors.items():
        assert torch.equal(tensor, tensors()[name])
    for name, stored in read_content(tmp_path / "b").tensors.items():
        np.testing.assert_array_equal(stored.array, ARRAYS[name])


EDGES = [0, 1, 0x7BFF, 0x7C00, 0x7C01, 0x7F7F, 0x7F80, 0x7FFF]
BYTES = {
    "float8_e4m3fn": [bytes([i]) for i in range(256)],
    "float8_e5m2": [bytes([i]) for i in range(256)],
    "float16": [np.uint16(i | sign).tobytes() for i in EDGES for sign in (0, 0x8000)],
    "bfloat16": [np.uint16(i | sign).tobytes() for i in EDGES for sign in (0, 0x8000)],
    "float32": [np.float32(x).tobytes() for x in (0, -3.4e38, 3.4e38, np.inf, -np.inf, np.nan)],
    "float64": [np.float64(x).tobytes() for x in (-0.0, -1.7e308, np.inf, -np.inf, -np.nan)],
    "complex64": [np.complex64(x).tobytes() for x in (1, complex(0, -np.inf), complex(np.nan, 0))],
}


@pytest.mark.parametrize("dtype", BYTES)
def test_what_is_finite(dtype):
    assert KINDS[dtype].infinity is not None
    for content in BYTES[dtype]:
        kind = getattr(torch, dtype)
        value = torch.frombuffer(bytearray(content), dtype=kind)
        wide = value if value.is_complex() else value.double()
        found = Stored(dtype, (1,), memoryview(bytearray(content))).is_finite
        assert found == bool(wide.isfinite().all()), content


def test_types_that_numpy_lacks():
    stored = Stored("float3", (1,), memoryview(bytearray(2)))
    with pytest.raises(CheckpointError, match="numpy has no type float3"):
        _ = stored.array
