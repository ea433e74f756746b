"""What a step will cost, known before it runs."""

import pytest
import torch
import torch.nn.functional as F
from helpers.predicted import Net, domain_of
from torch import nn

from lightning_da3 import DA3Error, InputError
from lightning_da3.memory import (
    SavedActivations,
    StepPredictor,
    measure_step,
    predict_step,
    saved_activation_bytes,
)


class Asks(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x) * (2 if float(x.sum()) > 0 else 1)


CASES = {
    "default": lambda: domain_of(Net()),
    "exact": lambda: domain_of(Net(), exact=True),
    "fine-tuning": lambda: Net().train(),
}


@pytest.mark.parametrize("case", CASES)
def test_figures_are_those_of_a_real_step(case):
    network = CASES[case]()
    x, y = torch.randn(8, 3, 64, 64), torch.zeros(8, dtype=torch.long)
    predicted = predict_step(network, x)
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1)

    def step():
        F.cross_entropy(network(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    peak = measure_step(step, repeats=0).peak_bytes
    with SavedActivations(network, inputs=x) as saved:
        loss = F.cross_entropy(network(x), y)
    del loss
    assert predicted.saved_activation_bytes == saved.bytes
    assert predicted.peak_bytes == pytest.approx(peak, rel=0.1)
    assert sum(node.saved_bytes for node in predicted.nodes) == saved.bytes
    assert max(predicted.timeline) == predicted.peak_bytes
    assert predicted.timeline[predicted.forward_end - 1] >= saved.bytes - x.nbytes


def test_nothing_of_the_network_changes():
    model = domain_of(Net())
    before = {name: p.clone() for name, p in model.state_dict().items() if hasattr(p, "clone")}
    seed = torch.get_rng_state()
    predict_step(model, torch.empty(2, 3, 64, 64, device="meta"))
    assert torch.equal(seed, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], model.state_dict()[name]) for name in before)
    assert saved_activation_bytes(model, torch.randn(2, 3, 64, 64)) > 0  # real again


def test_flops_are_counted_by_pass():
    network = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.Flatten(), nn.Linear(512, 3)
    )
    predicted = predict_step(network, torch.empty(2, 4, 8, 8))
    conv, linear = 2 * 2 * 8 * 64 * 2 * 9, 2 * 2 * 512 * 3
    assert predicted.flops_forward == conv + linear
    assert predicted.flops_backward == conv + 2 * linear  # the input needs no gradient


@pytest.mark.slow
def test_every_batch_size_follows_from_two():
    predictor = StepPredictor(domain_of(Net()))
    sizes = predictor.by_batch(torch.empty(1, 3, 64, 64))
    for count in (1, 3, 16):
        real, line = predictor(torch.empty(count, 3, 64, 64)), sizes.at(count)
        assert line.peak_bytes == pytest.approx(real.peak_bytes, rel=0.01)
        assert line.saved_activation_bytes == pytest.approx(real.saved_activation_bytes, rel=0.01)
        assert line.flops_forward == real.flops_forward
    peak = sizes.at(7).peak_bytes
    assert sizes.largest(peak) == 7
    assert sizes.largest(peak - 1) == 6
    assert sizes.largest(1) == 0


def test_an_optimizers_state_belongs_to_the_resting_model():
    network = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 2))
    plain = predict_step(network, torch.empty(2, 512))
    momentum = predict_step(
        network, torch.empty(2, 512), optimizer=lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)
    )
    assert momentum.peak_bytes == pytest.approx(plain.peak_bytes, rel=0.05)


def test_what_cannot_be_predicted_says_why():
    with pytest.raises(InputError, match=r"Net cannot make a training step .*\(2, 4, 64, 64\)"):
        predict_step(Net(), torch.empty(2, 4, 64, 64))
    with pytest.raises(DA3Error, match="Nothing of Net requires a gradient"):
        predict_step(Net().requires_grad_(False), torch.empty(2, 3, 64, 64))
    with pytest.raises(DA3Error, match=r"decides by values.*measure_step"):
        predict_step(Asks(), torch.empty(2, 4))
