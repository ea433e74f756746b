"""The domain file: what goes in comes out, nothing damaged does, and a good file survives."""

import errno
import json
import os
import struct
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from fixtures import v1
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from lightning_da3 import AdapterConfig, DA3Config, GateConfig, convert
from lightning_da3.errors import CheckpointError, ConfigError
from lightning_da3.files.domain_file import DomainFile, fingerprint, read_domain, write_domain

FIXTURE = Path(__file__).parents[1] / "fixtures" / "v1.safetensors"
METADATA = {"domain": "flowers", "num_classes": 102, "lr": 0.1, "sizes": [1, {"a": None}]}


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "head.weight": torch.randn(3, 4, generator=generator),
        "head.bias": torch.randn(3, generator=generator).bfloat16(),
        "steps": torch.tensor(7),
        "open": torch.tensor([True, False]),
        "none": torch.empty(0, 5),
    }


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor.detach().cpu(), rtol=0, atol=0)


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


# --- what goes in comes out


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


# --- fingerprint


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


# --- writing: the last good file survives


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


# --- reading: nothing damaged comes out


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
    monkeypatch.setattr("lightning_da3.files.domain_file.json.dumps", lambda *_, **__: text)
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
    from lightning_da3.files.domain_file import _plain, _string_metadata

    plain = {name: _plain(name, tensor) for name, tensor in values.items()}
    return save(plain, _string_metadata(plain, METADATA))


# --- memory and time of reading


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


# --- files of format version 1, for ever


def test_format_version_1():
    file = read_domain(FIXTURE)
    assert file.format_version == 1
    assert file.metadata["domain"] == "flowers"
    assert file.metadata["num_classes"] == 3
    assert file.metadata["extra"] == {"metrics": {"accuracy": 0.5}}
    assert fingerprint(file.tensors) == (
        "0ec0c425e12eeb288c578954e2848f205d0b0bd2f8f7f05003d5b6cfc68dad20"
    )


def test_a_domain_of_format_version_1_computes_what_it_did():
    model = convert(v1.network(), v1.CONFIG)
    assert model.load_domain(FIXTURE) == "flowers"
    for name, tensor in read_domain(FIXTURE).tensors.items():
        assert torch.equal(model.domain("flowers").state_dict()[name], tensor)
    model.eval().set_domain("flowers")
    with torch.no_grad():
        scores = model(v1.images())
    expected = torch.tensor(
        [
            [0.7858097553253174, -0.995338499546051, -0.10805314779281616],
            [1.0685782432556152, -1.2649214267730713, 0.14528435468673706],
        ]
    )
    torch.testing.assert_close(scores, expected, rtol=0, atol=2e-6)  # CPUs differ in the last bits
    assert model.executed_flops_fraction.item() == pytest.approx(2 / 3)


# --- what a file fits


@pytest.fixture
def learned(tmp_path):
    """A model with a domain of random values, and the domain's file."""
    model = convert(v1.network(), v1.CONFIG)
    model.add_domain("a", 3, class_names=["rose", "tulip", "lily"])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.domain("a").parameters():
            parameter.normal_(generator=generator)
    model.save_domain("a", tmp_path / "a.safetensors")
    return model, tmp_path / "a.safetensors"


def scores_of(model, **place):
    model.eval().set_domain("a")
    with torch.no_grad():
        return model(v1.images().to(**place))


def does_not_fit(path, network, config=v1.CONFIG):
    """The message of the refusal, which must leave the model as it was."""
    fresh = convert(network, config)
    with pytest.raises(CheckpointError) as caught:
        fresh.load_domain(path)
    assert fresh.domains == []
    message = str(caught.value)
    assert message.startswith(f"The domain file {str(path)!r} does not fit this model: ")
    return message


PLACES = [
    {"dtype": torch.float32},
    {"dtype": torch.bfloat16},
    {"memory_format": torch.channels_last},
    pytest.param(
        {"device": "cuda"},
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ),
]


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_a_freshly_made_model_computes_the_same_bits_everywhere(learned, place):
    model, path = learned
    fresh = convert(v1.network(), v1.CONFIG)
    fresh.load_domain(path)
    expected = scores_of(model.to(**place), **place)
    assert torch.equal(scores_of(fresh.to(**place), **place), expected)
    late = convert(v1.network(), v1.CONFIG).to(**place)  # moved, then loaded
    late.load_domain(path)
    assert torch.equal(scores_of(late, **place), expected)
    again = path.with_name("again.safetensors")
    late.save_domain("a", again)  # as it is there
    home = convert(v1.network(), v1.CONFIG).to(**place)
    home.load_domain(again)
    assert torch.equal(scores_of(home, **place), expected)


def test_a_backbone_that_was_converted_in_bfloat16(learned, tmp_path):
    _, path = learned
    network = v1.network().bfloat16()
    with torch.no_grad():
        network[0].weight.mul_(1.01)  # no longer a value of both types
    model = convert(network, v1.CONFIG)
    model.add_domain("a", 3)
    model.save_domain("a", tmp_path / "half.safetensors")
    fresh = convert(network, v1.CONFIG)
    fresh.load_domain(tmp_path / "half.safetensors")
    place = {"dtype": torch.bfloat16}
    assert torch.equal(scores_of(fresh, **place), scores_of(model, **place))
    message = does_not_fit(path, v1.network().bfloat16())
    assert "The architecture is the same, the weights differ (rounded to another" in message


def test_other_weights_are_named(learned):
    network = v1.network()
    with torch.no_grad():
        network[0].weight[0, 0, 0, 0] += 1
    message = does_not_fit(learned[1], network)
    assert "It was learned on another backbone (Sequential, fingerprint" in message
    assert "The architecture is the same, the weights differ" in message


def test_another_architecture_is_named(learned):
    network = v1.network()
    network[3] = torch.nn.Conv2d(4, 6, 1)
    message = does_not_fit(learned[1], network)
    assert "It was learned on another backbone" in message
    assert "The architecture differs." in message


@pytest.mark.parametrize(
    ("index", "layer"), [(2, torch.nn.ReLU6()), (5, torch.nn.AdaptiveMaxPool2d(1))]
)
def test_an_architecture_of_the_same_weights_is_named(learned, index, layer):
    network = v1.network()
    network[index] = layer
    message = does_not_fit(learned[1], network)
    assert "another architecture: the weights are the same, but layers or their" in message
    network = v1.network()
    network[3].dilation = network[3].padding = (2, 2)
    assert "another architecture" in does_not_fit(learned[1], network)


def test_another_head_is_no_other_backbone(learned):
    model, path = learned
    network = v1.network()
    network[-1] = torch.nn.Linear(6, 99)
    fresh = convert(network, v1.CONFIG)
    fresh.load_domain(path)
    assert torch.equal(scores_of(fresh), scores_of(model))


def test_another_config_is_named(learned):
    config = DA3Config(adapter=AdapterConfig(hidden_channels=3), gate=GateConfig(target=0.25))
    message = does_not_fit(
        learned[1], v1.network(), DA3Config(adapter=v1.CONFIG.adapter, gate=config.gate)
    )
    assert "Its config has gate={" in message
    assert "adapter=" not in message
    assert "plan" not in message


def test_another_plan_is_named(learned):
    path = learned[1]
    file = read_domain(path)
    write_domain(path, file.tensors, {**file.metadata, "plan": "0"})
    message = does_not_fit(path, v1.network())
    assert "Its plan has other hosts or another head, though backbone and config" in message


def rewritten(path, tensors=(), **about):
    file = read_domain(path)
    write_domain(path, {**file.tensors, **dict(tensors)}, {**file.metadata, **about})


def test_fields_that_a_later_config_gains_keep_their_defaults(learned):
    path = learned[1]
    config = read_domain(path).metadata["config"]
    del config["adapter"]["kernel_size"]  # as a version that did not have it
    del config["memory"]
    rewritten(path, config=config)
    convert(v1.network(), v1.CONFIG).load_domain(path)
    config["adapter"]["rank"] = 3  # of a version to come
    rewritten(path, config=config)
    assert "Its config cannot be read: AdapterConfig has no field" in does_not_fit(
        path, v1.network()
    )


@pytest.mark.parametrize("value", [0, -1, True, "3", None, [3], 2**40, 2**62, 2**64, 10**30])
def test_class_counts_that_do_not_fit_the_head(learned, value):
    rewritten(learned[1], num_classes=value, class_names=None)
    does_not_fit(learned[1], v1.network())


@pytest.mark.parametrize("names", [["a"], "abc", [1, 2, 3], 3, {"a": 1}])
def test_class_names_that_are_none(learned, names):
    rewritten(learned[1], class_names=names)
    assert "class_names" in does_not_fit(learned[1], v1.network())


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "", 3, None, "a\0b"])
def test_paths_in_the_place_of_a_name(learned, name):
    rewritten(learned[1], domain=name)
    assert "cannot name a domain" in does_not_fit(learned[1], v1.network())


def test_tensors_that_do_not_fit_are_all_named(learned):
    rewritten(
        learned[1],
        {
            "../x": torch.ones(1),
            "head.bias": torch.ones(3, dtype=torch.int64),
            "head.weight": torch.ones(4, 6),
        },
    )
    message = does_not_fit(learned[1], v1.network())
    assert "It has '../x', which is not expected." in message
    assert "'head.bias' is of torch.int64, not torch.float32." in message
    assert "'head.weight' has the shape (4, 6), not (3, 6)." in message
    file = read_domain(learned[1])
    write_domain(learned[1], {"head.bias": file.tensors["head.bias"]}, file.metadata)
    assert "It lacks ['adapters." in does_not_fit(learned[1], v1.network())


def test_class_names_live_in_the_file_and_in_the_state(learned):
    model, path = learned
    names = ["rose", "tulip", "lily"]
    fresh = convert(v1.network(), v1.CONFIG)
    fresh.load_domain(path)
    assert fresh.domain("a").class_names == names
    other = convert(v1.network(), v1.CONFIG)
    other.load_state_dict(model.state_dict())
    assert other.domain("a").class_names == names
    with pytest.raises(ConfigError, match="one name for each of the 2 classes, got 1"):
        fresh.add_domain("b", 2, class_names=["x"])
    with pytest.raises(ConfigError, match="must be a sequence of str, got 'xy'"):
        fresh.add_domain("b", 2, class_names="xy")
    assert fresh.domains == ["a"]
