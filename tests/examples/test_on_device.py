"""The figures of files for devices: what they compare, and when a verdict fails."""

import numpy as np
import pytest
from helpers.examples import start

pytest.importorskip("onnxruntime")


def test_verdicts():
    from on_device import Row, table

    rows = [
        Row("net", "off", 2e-5, asked=1e-5),
        Row("net", "time", 0.5, asked=0.6),
        Row("net", "faster", 2.4, "x", 2.5, least=True),
        Row("net", "ms", 12.345, "ms"),
    ]
    assert [row.good for row in rows] == [False, True, False, True]
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in table(rows).splitlines()]
    assert lines[2] == ["net", "off", "2.0e-05", "<= 1e-05", "FAIL"]
    assert lines[4] == ["net", "faster", "2.40 x", ">= 2.5", "FAIL"]
    assert lines[5] == ["net", "ms", "12.35 ms", "", ""]


def test_parameters_are_compared_as_one_vector_and_one_by_one():
    from device_files import apart_by

    own = {"a": np.array([3.0, 0.0], np.float32), "b": np.array([4.0], np.float32)}
    worst, whole = apart_by(own, {"a": own["a"], "b": own["b"] + np.float32(0.5)})
    assert worst == pytest.approx(0.125)
    assert whole == pytest.approx(0.1)


@pytest.mark.exhaustive
def test_a_quick_run_prints_a_table(tmp_path):
    process = start("on_device.py", "--quick", "--markdown", "table.md", folder=tmp_path)
    printed, _ = process.communicate(timeout=900)
    assert process.returncode == 0, printed
    written = (tmp_path / "table.md").read_text()
    assert written in printed
    off = [line for line in written.splitlines() if " off" in line and "<=" in line]
    assert len(off) >= 5  # and two more with ExecuTorch
    assert not any("FAIL" in line for line in off)
