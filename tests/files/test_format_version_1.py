"""Files of format version 1, for ever."""

from pathlib import Path

import pytest
import torch
from fixtures import v1

from lightning_da3 import convert
from lightning_da3.files.domain_file import fingerprint, read_domain

FIXTURE = Path(__file__).parents[1] / "fixtures" / "v1.safetensors"


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
        scale = 4 if ".value." in name else 1  # addends had none
        assert torch.equal(scale * model.domain("flowers").state_dict()[name], tensor)
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
