"""The copies that are run."""

import pytest
import torch
from helpers.verified import Net
from torch import fx, nn

from lightning_da3.verifying.batches import Known
from lightning_da3.verifying.expected import Expected, expected_of


def test_a_graph_of_torch_fx_prints_nothing_of_guesses_that_do_not_fit(capfd):
    class Positions(Net):
        def __init__(self):
            super().__init__()
            self.positions = nn.Parameter(torch.zeros(1, 3, 28, 28))

        def forward(self, x):
            return super().forward(x + self.positions)

    gm = fx.symbolic_trace(Positions().eval())
    known = Known(None, [[torch.empty(1, 3, side, side)] for side in (12, 28)])
    expected = expected_of(gm, known, thorough=None)
    assert isinstance(expected, Expected)
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")
    with pytest.raises(RuntimeError):  # the user's own speaks as ever
        gm(torch.randn(1, 3, 12, 12))
    assert "FX-traced Module" in capfd.readouterr().err
