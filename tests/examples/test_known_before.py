"""`examples/known_before.py` holds predictions against real steps."""

import pytest


@pytest.mark.exhaustive
def test_the_command_that_holds_predictions_against_real_steps(monkeypatch, capsys):
    known_before = pytest.importorskip("known_before")
    monkeypatch.setattr(
        "sys.argv", "known_before --models resnet18 --image-size 96 --batch-size 8".split()
    )
    assert known_before.main() == 0
    assert capsys.readouterr().out.count("pass") == 3
    monkeypatch.setattr(known_before, "PEAK_WITHIN", -1)
    assert known_before.main() == 1
