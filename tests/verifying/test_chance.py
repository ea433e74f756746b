"""What a rounding decides in the network itself is no difference."""

import torch
from helpers.verified import CONFIG
from torch import nn

from lightning_da3 import convert
from lightning_da3.verifying.batches import Known
from lightning_da3.verifying.expected import expected_of


class Sorts(nn.Module):
    """It sorts channels, which are the same to rounding, or far apart."""

    def __init__(self, *, same, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.norm = nn.Conv2d(3, 32, 3, bias=False), nn.BatchNorm2d(32)
        self.fc = nn.Linear(32, 3)
        if same:
            scale = torch.rand(32) + 0.5
            nn.init.ones_(self.conv.weight)
            self.norm.weight.data, self.norm.running_var = scale, scale**2 - self.norm.eps

    def forward(self, x):
        x = self.norm(self.conv(x))
        return self.fc(x.mean((2, 3))), x.argsort(1)


def test_what_a_rounding_decides_is_not_compared():
    model = convert(Sorts(same=True).eval(), CONFIG, torch.randn(2, 3, 12, 12))  # nothing warns
    assert not model.plan.python


def test_whole_numbers_that_no_rounding_decides_are_compared():
    x = torch.randn(2, 3, 12, 12)
    networks = [Sorts(same=False, seed=seed).eval() for seed in (0, 1)]
    expected = expected_of(networks[0], Known((x,)), thorough=True)
    models = [convert(network, CONFIG, x, verify=False) for network in networks]
    assert all(c.ok for c in expected.compare(models[0]))
    assert any(c.decided for c in expected.compare(models[1]))
