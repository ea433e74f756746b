"""Every trial on a small scale, and that it counts what goes wrong."""

import contextlib
import sys

import pytest
from helpers.examples import start


@pytest.mark.exhaustive
@pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")
@pytest.mark.parametrize("part", ["kills", "damage", "domains", "checkpoints", "disk"])
def test_durability(part, tmp_path):
    process = start("durability.py", "--quick", part, folder=tmp_path)
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 0, printed
    assert "  yes  " in printed
    assert "  NO   " not in printed


@pytest.mark.exhaustive
@pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")
def test_durability_counts_what_goes_wrong(tmp_path, monkeypatch, capfd):
    """On purpose: a writer that is not atomic, a reader that believes what it reads."""
    import damaged
    from trials import Scale

    from lightning_da3.files import content as checkpointing
    from lightning_da3.model import multi_domain as domains

    scale = Scale(damaged=13, races=20)
    with monkeypatch.context() as patch:
        patch.setattr(checkpointing, "_checksum", lambda *_: "")
        assert not damaged.damage(scale, tmp_path / "damage")
    with monkeypatch.context() as patch:
        patch.setattr(domains, "check_tensors", lambda *_: None)
        assert not damaged.damage(scale, tmp_path / "shapes")

    @contextlib.contextmanager
    def in_place(target):
        yield target

    monkeypatch.setattr(checkpointing, "replacing", in_place)
    (tmp_path / "disk").mkdir()
    assert not damaged.disk(scale, tmp_path / "disk")
    assert "  NO   " in capfd.readouterr().out
