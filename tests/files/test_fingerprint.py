"""Fingerprints of tensors."""

import time

import pytest
import torch
from helpers.domain_files import tensors

from lightning_da3.errors import CheckpointError
from lightning_da3.files.domain_file import fingerprint, write_domain


def test_fingerprint_ignores_order_strides_and_layout():
    x = torch.randn(2, 3, 4, 5)
    expected = fingerprint({"x": x, "y": torch.ones(3)})
    assert len(expected) == 64
    strided = torch.empty(2, 3, 4, 10)[..., ::2].copy_(x)
    for same in (x.to(memory_format=torch.channels_last), strided, torch.nn.Parameter(x)):
        assert fingerprint({"y": torch.ones(3), "x": same}) == expected
    z = torch.randn(3, dtype=torch.complex64)
    assert fingerprint({"z": z.conj()}) == fingerprint({"z": z.conj().resolve_conj()})
    negative = torch._neg_view(torch.ones(3))
    assert fingerprint({"z": negative}) == fingerprint({"z": -torch.ones(3)})


def test_fingerprint_is_of_names_dtypes_shapes_and_values():
    x = torch.zeros(2, 3)
    different = [
        {"x": x},
        {"y": x},
        {"x": x.reshape(3, 2)},
        {"x": x.int()},
        {"x": x + torch.eye(2, 3) * 1e-30},
        {"x": x, "y": x},
        {"x": x[:1], "y": x[1:]},
        {"x": torch.zeros(0)},
        {"x": torch.zeros(())},
        {},
    ]
    assert len({fingerprint(mapping) for mapping in different}) == len(different)


def test_fingerprint_is_the_same_tomorrow():
    expected = "e1a15622f914fe6a4fc5f5e95c9a14a7cad6b33892d6a6b902df284a15a018ab"
    assert fingerprint({"b": torch.tensor([1.0, -2.0]), "a": torch.tensor(3)}) == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_fingerprint_is_the_same_on_cuda():
    assert fingerprint({k: t.cuda() for k, t in tensors().items()}) == fingerprint(tensors())


@pytest.mark.slow
def test_fingerprint_of_a_resnet50_takes_seconds_at_most():
    weights = {str(i): torch.randn(256, 1000) for i in range(100)}  # 25.6 M values
    start = time.perf_counter()
    fingerprint(weights)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (torch.eye(2).to_sparse(), "torch.sparse_coo"),
        (torch.empty(2, device="meta"), "meta"),
    ],
)
def test_tensors_without_plain_values_are_refused(tmp_path, tensor, kind):
    with pytest.raises(CheckpointError, match=rf"tensor 'x' is not dense \({kind}"):
        fingerprint({"x": tensor})
    with pytest.raises(CheckpointError, match=r"Cannot write .*tensor 'x' is not dense"):
        write_domain(tmp_path / "f", {"x": tensor}, {})
