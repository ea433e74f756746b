"""The domain file: what goes in comes out, and a good file survives."""

import errno
import os
import sys

import pytest
import torch
from helpers.domain_files import METADATA, assert_equal, tensors

from lightning_da3.errors import CheckpointError
from lightning_da3.files.domain_file import DomainFile, read_domain, write_domain


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "flowers.safetensors"
    write_domain(path, tensors(), METADATA)
    return path


def test_round_trip(good):
    file = read_domain(str(good))
    assert isinstance(file, DomainFile)
    assert_equal(file.tensors, tensors())
    assert file.metadata == METADATA
    assert file.format_version == 1


def test_an_empty_domain_and_empty_metadata(tmp_path):
    write_domain(tmp_path / "f", {}, {})
    assert read_domain(tmp_path / "f") == DomainFile({}, {}, 1)


def test_any_strides_shared_memory_and_parameters(tmp_path):
    base = torch.randn(2, 3, 4, 4)
    given_tensors = {
        "last": base.to(memory_format=torch.channels_last),
        "view": base[:, 1:, ::2].transpose(0, 1),
        "same": base,
        "again": base,
        "parameter": torch.nn.Parameter(base[0]),
        "conj": torch.randn(3, dtype=torch.complex64).conj(),
        "narrow": torch.randn(4).to(torch.float8_e4m3fn),
    }
    write_domain(tmp_path / "f", given_tensors, {})
    narrow = given_tensors.pop("narrow")
    read = read_domain(tmp_path / "f").tensors
    assert torch.equal(read.pop("narrow").view(torch.uint8), narrow.view(torch.uint8))
    assert_equal(read, {k: t.resolve_conj() for k, t in given_tensors.items()})
    assert not any(tensor.requires_grad for tensor in read.values())


def test_the_file_is_plain_safetensors(good):
    from safetensors.torch import load_file

    assert_equal(load_file(good), tensors())


def test_read_tensors_outlive_the_file(good):
    read = read_domain(good).tensors
    with good.open("r+b") as file:
        file.truncate(0)
    assert_equal(read, tensors())
    read["head.weight"].add_(1)


def assert_survives(good):
    assert_equal(read_domain(good).tensors, tensors())
    assert [path.name for path in good.parent.iterdir()] == [good.name]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_values_that_are_not_finite_are_refused(good, value, dtype):
    bad = {"fine": torch.zeros(2), "bad": torch.tensor([0.0, value]).to(dtype)}
    with pytest.raises(CheckpointError, match=r"in \['bad'\]; the last good file is kept"):
        write_domain(good, bad, {})
    assert_survives(good)


@pytest.mark.parametrize(
    "metadata", [{"x": {1, 2}}, {"x": float("nan")}, {"x": torch.ones(1)}, {(1, 2): 3}]
)
def test_metadata_that_is_not_json_is_refused(good, metadata):
    with pytest.raises(CheckpointError, match="the metadata is not JSON"):
        write_domain(good, {}, metadata)
    assert_survives(good)


def test_metadata_that_holds_itself_is_refused(good):
    loop = {}
    loop["loop"] = loop
    with pytest.raises(CheckpointError, match="the metadata is not JSON"):
        write_domain(good, {}, loop)


def test_names_that_are_no_unicode_are_refused(good):
    with pytest.raises(CheckpointError, match="safetensors cannot hold these tensors"):
        write_domain(good, {"\ud800": torch.ones(1)}, {})
    assert_survives(good)


def test_names_that_the_format_reserves_are_refused(good):
    with pytest.raises(CheckpointError, match=r"\['__metadata__'\] cannot name tensors"):
        write_domain(good, {"__metadata__": torch.ones(1)}, {})
    with pytest.raises(CheckpointError, match=r"\[3\] cannot name tensors"):
        write_domain(good, {3: torch.ones(1)}, {})
    assert_survives(good)


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_failure_on_the_way_leaves_the_good_file(good, monkeypatch, call, error):
    def fails(*_args):
        raise error

    monkeypatch.setattr(os, call, fails)
    expected = CheckpointError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        write_domain(good, {"x": torch.ones(1)}, {})
    monkeypatch.undo()
    if expected is CheckpointError:
        assert f"Cannot write the domain file {str(good)!r}: No space left. " in str(caught.value)
    assert_survives(good)


def test_the_content_is_on_disk_before_the_name(good, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    write_domain(good, tensors(), {})
    assert calls == ["fsync", "replace", "fsync"]  # the second one is of the folder


def test_where_nothing_can_be_written(tmp_path):
    for path in (tmp_path, tmp_path / "missing" / "f", "x\0y"):
        with pytest.raises(CheckpointError, match="Cannot write the domain file"):
            write_domain(path, tensors(), {})
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="needs symbolic links")
def test_a_link_stays_a_link(good):
    link = good.with_name("latest")
    link.symlink_to(good.name)
    write_domain(link, {"x": torch.ones(1)}, {})
    assert link.is_symlink()
    assert read_domain(good).tensors.keys() == {"x"}
