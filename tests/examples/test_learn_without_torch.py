"""Domains that a process without PyTorch learned, beside PyTorch's."""

import pytest
from helpers.examples import start


@pytest.mark.slow
def test_learn_without_torch(tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    process = start("learn_without_torch.py", "--quick", "--epochs", "20", folder=tmp_path)
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 0, printed
    domain, here, there, loaded, off, bits, _ = (
        cell.strip() for cell in printed.splitlines()[-1].strip("|").split("|")
    )
    assert (domain, bits) == ("faces", "the same")
    assert loaded == there
    assert float(off) < 1e-4
    assert min(float(share.split("%")[0]) for share in (here, there)) > 60
    assert not list(tmp_path.iterdir())
