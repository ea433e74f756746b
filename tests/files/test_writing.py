"""A file made whole or not at all, and what writers that were killed left behind."""

import os
import sys
import time

import pytest

from lightning_da3.files.writing import remove_abandoned, replacing

LEFT = f".a.safetensors.{'0' * 32}.tmp"
DAY_S = 86_400


def grow_old(path, seconds=DAY_S):
    then = time.time() - seconds
    os.utime(path, (then, then))


def write(path, text="new"):
    with replacing(path) as temporary:
        temporary.write_text(text)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_a_killed_writer_left_is_removed_once_it_is_old(tmp_path):
    (tmp_path / LEFT).write_text("half")
    write(tmp_path / "b")
    assert names(tmp_path) == [LEFT, "b"]  # its writer may be about to lock it
    grow_old(tmp_path / LEFT)
    write(tmp_path / "b")
    assert names(tmp_path) == ["b"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs locks")
def test_a_living_writer_keeps_its_file(tmp_path):
    with replacing(tmp_path / "a") as temporary:
        temporary.write_text("new")
        grow_old(temporary)  # of a computer that slept for a day, say
        write(tmp_path / "b")
        remove_abandoned(tmp_path, older_than_s=0)
        assert temporary.exists()
    assert names(tmp_path) == ["a", "b"]


@pytest.mark.parametrize("name", [".a.tmp", "a.0.tmp", f".a.{'g' * 32}.tmp", f"a.{'0' * 32}.tmp"])
def test_other_people_s_files_are_left_alone(tmp_path, name):
    (tmp_path / name).write_text("mine")
    grow_old(tmp_path / name)
    (tmp_path / LEFT).mkdir()
    grow_old(tmp_path / LEFT)
    write(tmp_path / "b")
    assert {name, LEFT} <= {*names(tmp_path)}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_of_such_a_name_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / LEFT)
    grow_old(tmp_path / LEFT)
    write(tmp_path / "b")
    assert names(tmp_path) == [LEFT, "b"]


def test_only_files_on_their_way_to_one_name(tmp_path):
    other = LEFT.replace(".a.", ".aa.")
    for name in (LEFT, other):
        (tmp_path / name).write_text("half")
    remove_abandoned(tmp_path, "a.safetensors", older_than_s=0)
    assert names(tmp_path) == [other]
    remove_abandoned(tmp_path / "missing")


def test_an_error_in_the_block_leaves_what_was_there(tmp_path):
    write(tmp_path / "a", "old")
    with pytest.raises(TypeError):
        write(tmp_path / "a", 3)
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_the_file_is_as_open_to_others_as_any_other(tmp_path):
    write(tmp_path / "a")
    (tmp_path / "b").write_text("")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode
