"""How a fresh adapter starts to learn."""

import torch

from lightning_da3.nn.adapter import Adapter


def test_the_first_step_moves_the_addend_by_more_than_the_learning_rate():
    """Under Adam a first step moves every weight by the rate, whatever its gradient."""
    torch.manual_seed(0)
    adapter = Adapter(8, 6, 16, 3, gated=True, exact=True)
    p = torch.randn(4, 8, 5, 5)
    before = adapter(p)
    assert not before.addend.any()
    assert bool(before.gate.all())
    optimizer = torch.optim.Adam([adapter.value.bias], lr=1e-3)
    before.addend.sum().backward()
    optimizer.step()
    torch.testing.assert_close(adapter(p).addend, torch.full((4, 6, 5, 5), -4e-3))
