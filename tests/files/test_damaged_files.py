"""Reading a domain file: nothing damaged or foreign comes out, and little memory is taken."""

import json
import os
import struct
import tracemalloc
from pathlib import Path

import pytest
import torch
from helpers.domain_files import METADATA, assert_equal, tensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from lightning_da3.errors import CheckpointError
from lightning_da3.files.domain_file import read_domain, write_domain


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "flowers.safetensors"
    write_domain(path, tensors(), METADATA)
    return path


def refused(path, *parts):
    """The message of the refusal, which must name the path and say what to do."""
    with pytest.raises(CheckpointError) as caught:
        read_domain(path)
    message = str(caught.value)
    for part in (f"Cannot read the domain file {str(path)!r}: ", *parts):
        assert part in message
    assert message.count("Cannot read") == 1
    assert message.endswith(".")
    return message


def test_what_is_no_file(tmp_path):
    refused(tmp_path / "missing", "No such file")
    refused(tmp_path, "it is a folder")
    refused("x\0y")
    (tmp_path / "empty").touch()
    refused(tmp_path / "empty", "it is empty")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "no regular file")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_file_that_becomes_a_pipe_while_it_is_opened_is_not_waited_for(good, monkeypatch):
    status = good.stat()
    good.unlink()
    os.mkfifo(good)
    monkeypatch.setattr(type(good), "stat", lambda *_, **__: status)
    refused(good, "no regular file")


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs devices")
def test_a_device_is_not_read():
    refused("/dev/zero", "no regular file")


def test_what_the_system_will_not_open(good, monkeypatch):
    loop = good.with_name("loop")
    loop.symlink_to(loop)
    refused(loop, "symbolic link")
    refused(good.with_name("x" * 5000), "name too long")

    def forbidden(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", forbidden)  # root could read it
    refused(good, "Permission denied", "Check that the path exists, and its permissions")


def strings(**changes):
    write = {"format": "lightning_da3", "format_version": "1", "metadata": "{}", "sha256": "0"}
    return {k: v for k, v in (write | changes).items() if v is not None}


@pytest.mark.parametrize(
    ("metadata", "part"),
    [
        (None, "its format is None, not 'lightning_da3'"),
        (strings(format="pt"), "its format is 'pt'"),
        (strings(format_version="2"), "it has format version 2, this package reads up to 1"),
        (strings(format_version="9" * 9999), "no valid format version"),
        (strings(format_version="0"), "no valid format version ('0')"),
        (strings(format_version=None), "no valid format version (None)"),
        (strings(), "does not match its checksum"),
        (strings(sha256=None), "does not match its checksum"),
        (strings(metadata=None), "does not match its checksum"),
    ],
)
def test_foreign_and_newer_files(tmp_path, metadata, part):
    save_file({"x": torch.ones(2)}, tmp_path / "f", metadata)
    refused(tmp_path / "f", part)


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", "[" * 100_000])
def test_metadata_that_is_no_json_object(tmp_path, monkeypatch, text):
    monkeypatch.setattr("lightning_da3.files.content._json_of", lambda _: text)
    write_domain(tmp_path / "f", {}, {})
    monkeypatch.undo()
    refused(tmp_path / "f")


def test_a_header_longer_than_the_file_is_not_read(tmp_path):
    (tmp_path / "f").write_bytes(struct.pack("<Q", 2**40) + b"{}")
    refused(tmp_path / "f", f"it is 10 bytes long and declares a header of {2**40} bytes")


def with_header(header, payload=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + payload


TERABYTE = 2**40
ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        b"\x00",
        struct.pack("<Q", TERABYTE) + b"{}",
        struct.pack("<Q", 2**64 - 1) + b"{}",
        with_header(b""),
        with_header(b"\xff\xfe"),
        with_header(b"[" * 100_000),
        with_header([]),
        with_header({"x": 1}),
        with_header({"x": {}}),
        with_header({"x": ENTRY}),
        with_header({"x": ENTRY}, bytes(7)),
        with_header({"x": ENTRY}, bytes(9)),
        with_header({"x": ENTRY | {"shape": [TERABYTE]}}, bytes(8)),
        with_header({"x": ENTRY | {"shape": [TERABYTE, TERABYTE, TERABYTE]}}, bytes(8)),
        with_header({"x": ENTRY | {"shape": [-2]}}, bytes(8)),
        with_header({"x": ENTRY | {"dtype": "F31"}}, bytes(8)),
        with_header({"x": ENTRY | {"data_offsets": [0, TERABYTE]}}, bytes(8)),
        with_header({"x": ENTRY | {"data_offsets": [8, 0]}}, bytes(8)),
        with_header({"__metadata__": {"format": 1}, "x": ENTRY}, bytes(8)),
        with_header({"__metadata__": strings(), "x": ENTRY, "y": ENTRY}, bytes(8)),
        with_header({"__metadata__": strings(), "x": ENTRY | {"dtype": "F4"}}, bytes(1)),
        b"PK\x03\x04" + bytes(1000),
    ],
)
def test_crafted_files(tmp_path, content):
    (tmp_path / "f").write_bytes(content)
    refused(tmp_path / "f")


def test_every_truncation_is_noticed(good):
    content = good.read_bytes()
    for length in range(len(content)):
        good.write_bytes(content[:length])
        refused(good)
    good.write_bytes(content + b"\0")
    refused(good)


def test_every_flipped_bit_is_noticed(good):
    content = good.read_bytes()
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        good.write_bytes(flipped)
        refused(good)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_overwritten_bytes_are_noticed(good, data):
    content = bytearray(save_of(tensors()))
    start = data.draw(st.integers(0, len(content) - 1))
    patch = data.draw(st.binary(min_size=1, max_size=40))
    damaged = content[:start] + patch + content[start + len(patch) :]
    path = good.with_name("damaged")
    path.write_bytes(damaged)
    try:
        read = read_domain(path)
    except CheckpointError:
        return
    assert_equal(read.tensors, tensors())  # the patch changed nothing that is read
    assert read.metadata == METADATA


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(content=st.binary(max_size=200))
def test_noise_is_refused(tmp_path, content):
    (tmp_path / "f").write_bytes(content)
    refused(tmp_path / "f")


def save_of(values):
    """The bytes of a good file, made without a disk."""
    from lightning_da3.files.content import _checksum
    from lightning_da3.files.domain_file import _stored

    text = json.dumps(METADATA)
    sha256 = _checksum({name: _stored(name, tensor) for name, tensor in values.items()}, text)
    return save(values, strings(metadata=text, sha256=sha256))


def test_reading_takes_no_more_memory_than_the_file_is_long(tmp_path):
    path = tmp_path / "f"
    write_domain(path, {f"x{i}": torch.ones(100_000) for i in range(10)}, {})
    read_domain(path)
    tracemalloc.start()
    file = read_domain(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size < peak < path.stat().st_size + 100_000
    storages = {tensor.untyped_storage().data_ptr() for tensor in file.tensors.values()}
    assert max(storages) - min(storages) < path.stat().st_size  # all in the one buffer


def test_metadata_that_would_not_be_read_is_not_written(tmp_path):
    with pytest.raises(CheckpointError, match=r"at most 8388608 are allowed\. Give less"):
        write_domain(tmp_path / "f", {}, {"x": "x" * 2**23})
    assert not list(tmp_path.iterdir())
    (tmp_path / "f").write_bytes(with_header(b" " * (2**23 + 1)))
    refused(tmp_path / "f", "its header, with the metadata, has 8388609 bytes")


def test_shapes_of_many_huge_axes_cost_no_time(tmp_path):
    entry = ENTRY | {"shape": [2**62] * 200_000}
    (tmp_path / "f").write_bytes(with_header({"x": entry}, bytes(8)))
    refused(tmp_path / "f")


def test_a_file_longer_than_it_declares_costs_no_time_and_no_memory(tmp_path, monkeypatch):
    path = tmp_path / "f"
    path.write_bytes(with_header({"__metadata__": strings(), "x": ENTRY}, bytes(8)))
    size = 2**31
    os.truncate(path, size)  # sparse: takes no room on the disk
    tracemalloc.start()
    refused(path, "it is longer than its tensors")
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    os.truncate(path, 2**42)
    refused(path, f"it has {2**42} bytes; at most {2**32} are allowed")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2, torch.complex64]
)
def test_values_that_are_no_numbers_are_refused_whatever_the_checksum(
    tmp_path, monkeypatch, value, dtype
):
    name = "lightning_da3.files.content._not_finite"
    bad = torch.tensor([1.0, value]).to(dtype)
    with monkeypatch.context() as patch:
        patch.setattr(name, lambda _: [])
        write_domain(tmp_path / "f", {"good": torch.ones(2), "bad": bad}, {})
    refused(tmp_path / "f", "NaN or infinite values in ['bad']")
