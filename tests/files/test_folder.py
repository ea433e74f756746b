"""A folder of domains: its index is quick, and never believed over the files."""

import json
import os
import threading
from pathlib import Path

import pytest
import torch
from helpers import models

from lightning_da3 import (
    AdapterConfig,
    CheckpointError,
    DA3Config,
    DomainError,
    DomainFolder,
    convert,
)
from lightning_da3.files import folder as folder_module
from lightning_da3.files.domain_file import read_domain

CONFIG = DA3Config(adapter=AdapterConfig(hidden_channels=2, min_stride=1))


def model(*names):
    made = convert(models.randomise_(models.zoo("Residual")), CONFIG)
    for name in names:
        made.add_domain(name, 2, ["cat", "dog"])
        with torch.no_grad():
            for parameter in made.domain(name).parameters():
                parameter.normal_()
    return made


@pytest.fixture(scope="module")
def donor():
    return model("b", "a")


@pytest.fixture
def folder(tmp_path, donor):
    filled = DomainFolder(tmp_path / "domains")
    for name in donor.domains:
        filled.save(donor, name, metrics={"accuracy": 0.5})
    return filled


@pytest.fixture
def reads(monkeypatch):
    """Names of the files that are read to make an index."""
    read = []
    original = folder_module.read_domain
    monkeypatch.setattr(
        folder_module, "read_domain", lambda path: (read.append(path.stem), original(path))[1]
    )
    return read


def test_what_is_saved_is_listed_and_loads(folder):
    assert folder.names() == ["a", "b"]
    about = folder.index()["a"]
    assert about["num_classes"] == 2
    assert about["class_names"] == ["cat", "dog"]
    assert about["extra"] == {"metrics": {"accuracy": 0.5}}
    fresh = model()
    folder.load(fresh, "a")
    assert fresh.domains == ["a"]
    assert fresh.domain("a").class_names == ["cat", "dog"]


def test_an_empty_folder_needs_not_exist(tmp_path):
    empty = DomainFolder(tmp_path / "missing")
    assert empty.names() == []
    assert empty.damaged() == {}
    with pytest.raises(DomainError, match=r"There is no domain 'a' in .*There are \[\]"):
        empty.load(model(), "a")
    assert not (tmp_path / "missing").exists()


def test_an_index_that_is_up_to_date_is_read_alone(folder, reads):
    assert folder.names() == ["a", "b"]
    assert reads == []
    folder.rebuild_index()
    assert reads == ["a", "b"]


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", "3", '{"version": 1}', '{"version": 2, "domains": {}}',
        '{"version": 1, "domains": [1]}', '{"version": 1, "domains": {"a": 3, "c": {}}}',
        '{"version": 1, "domains": {"a": {"stamp": [0, 0, 0], "about": {"error": "no"}}}}',
        "[" * 100_000,
    ],
)  # fmt: skip
def test_a_damaged_index_is_made_again(folder, content):
    path = folder.path / "index.json"
    before = json.loads(path.read_text())
    path.write_text(content)
    assert folder.names() == ["a", "b"]
    assert json.loads(path.read_text()) == before
    path.unlink()
    assert folder.names() == ["a", "b"]
    assert json.loads(path.read_text()) == before


def test_an_entry_is_right_in_its_stamp_but_no_entry(folder):
    path = folder.path / "index.json"
    index = json.loads(path.read_text())
    del index["domains"]["a"]["about"]
    path.write_text(json.dumps(index))
    assert folder.names() == ["a", "b"]
    assert folder.index()["a"]["num_classes"] == 2


def test_files_that_came_went_and_changed_behind_its_back(folder, reads):
    donor = model("c", "b")
    donor.save_domain("c", folder.path / "c.safetensors")
    donor.save_domain("b", folder.path / "b.safetensors", note="new")
    (folder.path / "a.safetensors").unlink()
    assert folder.names() == ["b", "c"]
    assert folder.index()["b"]["extra"] == {"note": "new"}
    assert reads == ["b", "c"]


def test_a_renamed_file_is_a_domain_of_its_new_name(folder):
    folder.file("a").rename(folder.file("twin"))
    assert folder.names() == ["b", "twin"]
    fresh = model()
    folder.load(fresh, "twin")
    assert fresh.domains == ["twin"]


def test_damaged_and_foreign_files_are_named_and_hide_no_other(folder):
    content = folder.file("a").read_bytes()
    folder.file("a").write_bytes(content[:-1])
    (folder.path / "no name.safetensors").write_bytes(content)
    (folder.path / ".b.safetensors.0.tmp").write_bytes(content)
    (folder.path / "notes.txt").write_text("")
    assert folder.names() == ["b"]
    assert sorted(folder.damaged()) == ["a", "no name"]
    assert "Cannot read the domain file" in folder.damaged()["a"]
    assert "cannot name a domain" in folder.damaged()["no name"]
    with pytest.raises(CheckpointError, match="Cannot read the domain file"):
        folder.load(model(), "a")


def test_a_lying_index_changes_nothing_that_is_loaded(folder):
    path = folder.path / "index.json"
    index = json.loads(path.read_text())
    index["domains"]["a"]["about"]["num_classes"] = 7
    path.write_text(json.dumps(index))
    fresh = model()
    folder.load(fresh, "a")
    assert fresh.domain("a").num_classes == 2


def test_paths_are_no_names(folder):
    for name in ("../a", "/a", "", "a/b", "a.b"):
        with pytest.raises(DomainError, match="cannot name a domain"):
            folder.load(model(), name)
        with pytest.raises(DomainError):
            folder.save(model("a"), name)


def test_where_no_folder_can_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="Cannot make the folder"):
        DomainFolder(tmp_path / "file").save(model("a"), "a")
    with pytest.raises(CheckpointError, match="Cannot read the folder"):
        DomainFolder(tmp_path / "file").names()


def test_a_folder_that_cannot_be_written_needs_no_index(folder, monkeypatch):
    (folder.path / "index.json").unlink()

    def refuse(*_args):
        raise PermissionError

    monkeypatch.setattr(os, "replace", refuse)
    assert folder.names() == ["a", "b"]
    assert not (folder.path / "index.json").exists()


def within(seconds, call):
    """What a call returns, or a failure where it waits."""
    results = []
    thread = threading.Thread(target=lambda: results.append(call()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert results, "still waiting"
    return results[0]


def pipe(path):
    os.mkfifo(path)


def device(path):
    path.symlink_to("/dev/zero")


def sparse(path):
    path.touch()
    os.truncate(path, 2**40)


def loop(path):
    path.symlink_to(path.name)


def dangling(path):
    path.symlink_to("nothing")


STRANGE = {
    "pipe": pipe, "device": device, "sparse": sparse, "folder": Path.mkdir, "loop": loop,
    "dangling": dangling,
}  # fmt: skip


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("kind", STRANGE)
def test_an_index_that_is_no_file_is_not_waited_for(folder, kind):
    (folder.path / "index.json").unlink()
    STRANGE[kind](folder.path / "index.json")
    assert within(10, folder.names) == ["a", "b"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("kind", STRANGE)
def test_what_is_no_domain_file_hides_no_other(folder, kind):
    STRANGE[kind](folder.path / "c.safetensors")
    assert within(10, folder.names) == ["a", "b"]
    assert "Cannot read the domain file" in folder.damaged()["c"]
    with pytest.raises(CheckpointError, match="Cannot read the domain file"):
        read_domain(folder.file("c"))


def test_a_file_that_can_be_read_again_is_no_longer_named(folder, monkeypatch):
    with monkeypatch.context() as patch:

        def forbidden(path):
            raise CheckpointError(f"Cannot read the domain file {str(path)!r}: Permission denied.")

        patch.setattr(folder_module, "read_domain", forbidden)
        folder.rebuild_index()
    assert folder.names() == ["a", "b"]  # neither size nor time tells that it was permitted


@pytest.mark.parametrize("path", ["x" * 300, "y/" * 3000, "null\0"])
def test_a_folder_that_no_system_could_have(tmp_path, path):
    absurd = DomainFolder(tmp_path / path)
    for call in (absurd.names, absurd.damaged, lambda: absurd.load(None, "a")):
        with pytest.raises(CheckpointError, match=r"Cannot read the folder .*Check its path"):
            call()
    with pytest.raises(CheckpointError, match=r"Cannot make the folder .*Check its path"):
        absurd.save(None, "a")


def test_a_folder_that_must_not_be_read(folder, monkeypatch):
    def forbidden(_self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", forbidden)  # root could read it
    for call in (folder.names, lambda: folder.load(None, "a")):
        with pytest.raises(CheckpointError, match=r"Permission denied\. Check its path and perm"):
            call()


def test_names_that_differ_by_case_alone_do_not_meet(folder):
    donor = model("A", "a")
    before = folder.file("a").read_bytes()
    with pytest.raises(DomainError, match="'A' and 'a' differ by case alone"):
        folder.save(donor, "A")
    with pytest.raises(DomainError, match="There is no domain 'A' in"):
        folder.load(model(), "A")
    assert folder.file("a").read_bytes() == before
    folder.save(donor, "a")
    assert folder.file("a").read_bytes() != before
    assert folder.names() == ["a", "b"]


def test_a_folder_that_has_both_keeps_both(folder):
    donor = model("A")
    donor.save_domain("A", folder.path / "A.safetensors")
    if folder.names() != ["A", "a", "b"]:
        pytest.skip("the file system ignores case")
    folder.save(donor, "A")
    folder.load(model(), "a")


def test_a_file_with_the_name_of_a_device_is_named(folder):
    folder.file("a").rename(folder.path / "con.safetensors")
    assert folder.names() == ["b"]
    assert "on Windows a file of that name is a device" in folder.damaged()["con"]
