"""Heads that start where the samples of their domain say."""

import torch
import torch.nn.functional as F
from helpers.domains import refused
from helpers.learned import ADAPTER, batch, converted, outputs
from torch import nn

from lightning_da3 import ConfigError, DA3Config, InputError, convert

LABELS = torch.arange(16) % 3


def samples():
    torch.manual_seed(0)
    return torch.randn(16, *batch().shape[1:])


def test_the_start_is_the_ridge_regression_of_what_the_loss_asks():
    model, x = converted("a"), samples()
    model.set_domain("a")
    features = []
    handle = model.domain("a").head.register_forward_hook(lambda _, i, o: features.append(i[0]))
    model.eval()(x)
    handle.remove()
    model.train().set_domain(None)
    model.start_head("a", [(x[:10], LABELS[:10]), [x[10:], LABELS[10:]]])
    f, y = features[0].detach().double(), F.one_hot(LABELS, 3).double() - 1 / 3
    head = model.domain("a").head
    f, y = f - f.mean(0), y - y.mean(0)
    found = []
    for power in range(-8, 7):
        penalty = f.square().sum() / len(f) * 2.0**power
        inverse = torch.linalg.inv(f.T @ f + penalty * torch.eye(f.shape[1]).double())
        left = y - f @ inverse @ f.T @ y
        freedom = len(f) - 1 - (f @ inverse @ f.T).trace()
        found.append((float(left.square().sum() / freedom**2), inverse @ f.T @ y))
    want = min(found, key=lambda pair: pair[0])[1].T.float()
    torch.testing.assert_close(head.weight.detach(), want, rtol=1e-3, atol=1e-5)
    middle = F.linear(features[0], head.weight, head.bias).mean(0)
    shares = torch.bincount(LABELS).float() / 16 - 1 / 3
    torch.testing.assert_close(middle, shares, rtol=0, atol=1e-5)


def test_all_else_is_as_before():
    model = converted("a", "b")
    model.set_domain("b")
    model.train()
    modes = [m.training for m in model.modules()]
    others, x = [outputs(model, name) for name in (None, "b")], samples()
    model.set_domain("b")
    seed = torch.get_rng_state()
    model.start_head("a", [(x, LABELS)])
    assert torch.equal(seed, torch.get_rng_state())
    assert model.active_domain == "b"
    assert modes == [m.training for m in model.modules()]
    assert all(p.grad is None for p in model.parameters())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"bank.b.{n}" for n, _ in model.domain("b").named_parameters()
    }
    assert all(map(torch.equal, others, [outputs(model, name) for name in (None, "b")]))


class Dense(nn.Module):
    """Scores of every pixel, enlarged."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.classifier = nn.Conv2d(8, 5, 1)

    def forward(self, x):
        return F.interpolate(self.classifier(self.conv(x).relu()), scale_factor=2.0)


def test_scores_of_pixels_start_lower_in_any_loss():
    torch.manual_seed(0)
    model = convert(Dense(), DA3Config(adapter=ADAPTER))
    model.add_domain("a", num_classes=1)
    x = torch.randn(4, 3, 8, 8)
    y = (x.mean(1, keepdim=True) > 0).float()
    model.start_head("a", [(x, y)], F.binary_cross_entropy_with_logits)
    model.set_domain("a")
    assert F.binary_cross_entropy_with_logits(model(x), y) < 0.69  # of zeros


def test_what_cannot_start_is_refused():
    model = converted("a")
    start = model.start_head
    x, _ = pair = (samples(), LABELS)
    with refused(ConfigError, "`batches` must be a list or a loader"):
        start("a", 3)
    with refused(InputError, "must be pairs of samples and targets"):
        start("a", [x])
    with refused(InputError, "starts from samples; there were none"):
        start("a", [])
    with refused(InputError, "does not depend on the domain's head"):
        start("a", [pair], lambda *_: torch.ones(()))
    with refused(InputError, "not finite"):
        start("a", [(x * torch.inf, LABELS)])
    without = converted("a", config=DA3Config(adapter=ADAPTER, head=None))
    with refused(ConfigError, "has no head of its own"):
        without.start_head("a", [pair])
