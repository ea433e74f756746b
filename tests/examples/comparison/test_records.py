"""Nothing finished is lost: the file of what is finished."""

import errno
import json
import os

import pytest


def records(path, settings=None, **options):
    from comparison.records import Records

    return Records(path, settings or {"epochs": 2}, **options)


def test_what_is_finished_is_one_line_each(tmp_path):
    path = tmp_path / "new" / "finished.jsonl"
    done = records(path)
    done.add(("learn", "DA3", "digits", "0"), {"accuracy": 0.5})
    done.add(("cost", "DA3"), {"step_ms": 3.0})
    again = records(path)
    assert len(again) == 2
    assert again["learn", "DA3", "digits", "0"] == {"accuracy": 0.5}
    assert ("cost", "DA3") in again
    assert again.get("cost", "other") is None
    lines = path.read_text().splitlines()
    assert [json.loads(line) for line in lines][1]["key"] == ["learn", "DA3", "digits", "0"]
    assert len(lines) == 3
    assert [p.name for p in path.parent.iterdir()] == ["finished.jsonl"]
    assert len(records(path, fresh=True)) == 0


def test_other_settings_are_named(tmp_path):
    from comparison.input_errors import InputError

    path = tmp_path / "finished.jsonl"
    records(path).add(("a",), {})
    with pytest.raises(InputError, match=r"epochs=2, this run has epochs=3: .*--fresh"):
        records(path, {"epochs": 3})
    assert len(records(path, {"epochs": 3}, fresh=True)) == 0


@pytest.mark.parametrize("content", ["", "no json", "{}\n[1]\n", '{}\n{"x": 1}\n', '"a"\n3\n'])
def test_another_file_in_its_place(tmp_path, content):
    from comparison.input_errors import InputError

    path = tmp_path / "finished.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match="is no file of this command: remove it"):
        records(path)


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_full_disk_leaves_what_was_finished(tmp_path, monkeypatch, moment):
    from comparison.input_errors import InputError

    path = tmp_path / "finished.jsonl"
    done = records(path)
    done.add(("a",), {"x": 1})

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if moment == "fsync":
            patch.setattr(os, "fsync", full)
        else:
            patch.setattr("pathlib.Path.replace", full)
        with pytest.raises(InputError, match=r"No space left on device\): make room.*goes on"):
            done.add(("b",), {"x": 2})
    assert ("b",) not in done
    assert len(records(path)) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["finished.jsonl"]
    done.add(("b",), {"x": 2})  # there is room again
    assert len(records(path)) == 2
