"""What is computed again from several values, or past layers that keep little smaller."""

import pytest
import torch
import torch.nn.functional as F
from helpers.comparing import add, assert_gradients_close, assert_relatively_close, score
from torch import nn

from lightning_da3 import AdapterConfig, DA3Config, MemoryConfig, convert
from lightning_da3.memory import SavedActivations


class Pyramid(nn.Module):
    """A classifier of positions that reads the sum of two branches."""

    def __init__(self):
        super().__init__()
        self.stem, self.host = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)
        self.high, self.low = nn.Conv2d(8, 16, 1), nn.Conv2d(8, 16, 1)
        self.norms = nn.ModuleList(nn.GroupNorm(4, 16) for _ in range(2))
        self.head = nn.Conv2d(16, 3, 1)

    def forward(self, x):
        x = self.stem(x)
        low = F.relu(self.norms[0](self.low(self.host(x))))
        high = F.relu(self.norms[1](self.high(F.interpolate(low, scale_factor=2.0)[:, :8] + x)))
        return self.head(high + F.interpolate(low, scale_factor=2.0))


class MixFfn(nn.Module):
    """A depthwise convolution between a wide layer and its activation."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4)
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))
        self.fc1, self.fc2 = nn.Linear(8, 32), nn.Linear(32, 8)
        self.dw = nn.Conv2d(32, 32, 3, 1, 1, groups=32)
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x):
        x = self.embed(x).permute(0, 2, 3, 1)
        q, k, v = self.qkv(self.norms[0](x)).flatten(1, 2).chunk(3, -1)
        x = x + F.scaled_dot_product_attention(q, k, v).view_as(x)
        y = self.fc1(self.norms[1](x)).permute(0, 3, 1, 2)
        x = x + self.fc2(F.gelu(self.dw(y)).permute(0, 2, 3, 1))
        return self.head(x.mean((1, 2)))


class DrawnAttention(nn.Module):
    """Attention that draws: its scores and its values are both computed again from one another."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Conv2d(3, 16, 4, 4), nn.LayerNorm(16)
        self.qkv, self.project, self.head = nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 3)
        self.wide, self.narrow = nn.Linear(16, 32), nn.Linear(32, 16)

    def attend(self, x):
        n, t, d = x.shape
        qkv = self.qkv(self.norm(x)).reshape(n, t, 3, 2, d // 2)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.transpose(-2, -1)
        scores = scores.softmax(-1) * torch.empty_like(scores).bernoulli_(0.7)
        return x + self.project((scores @ v).transpose(1, 2).reshape(x.shape))

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = self.attend(x)
        x = x + self.narrow(F.gelu(self.wide(self.norm(x))))
        return self.head(self.attend(x).mean(1))


ADAPTER = AdapterConfig(hidden_channels=4, max_cells=16, min_stride=4, min_depth=0.0)


def learned(kind, **memory):
    torch.manual_seed(0)
    config = DA3Config(adapter=ADAPTER, gate=None, memory=MemoryConfig(**memory))
    model = add(convert(kind(), config), "a")
    model.set_domain("a")
    return model.train()


def gradients(model, x):
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad(score(model(x)), trained)


def kept(model, x):
    with SavedActivations(model, inputs=x) as saved:
        output = model(x)
    del output
    return saved


@pytest.mark.parametrize("kind", [Pyramid, MixFfn])
def test_gradients_are_as_near_as_codes_of_the_sources_allow(kind):
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = gradients(learned(kind, exact=True).double(), x.double())
    found = gradients(learned(kind), x)
    assert_gradients_close(found, expected, 0.03)


def test_the_classifier_of_positions_keeps_nothing_of_its_own():
    model, x = learned(Pyramid), torch.randn(2, 3, 32, 32)
    assert "bank.a.head" not in kept(model, x).by_module
    step = next(node for part in model.plan.parts for node in part.nodes if node.place == "head")
    assert step.keeps == "recomputed"


def test_what_a_depthwise_layer_hands_on_keeps_nothing_of_its_own():
    model, x = learned(MixFfn), torch.randn(2, 3, 32, 32)
    nodes = [node for part in model.plan.parts for node in part.nodes]
    assert next(n for n in nodes if n.layer == "gelu").keeps == "recomputed"
    assert kept(model, x).bytes < 2 * 64 * 32 * 1.3 + 2 * 64 * 8 * 4  # as codes, before


class Skip(nn.Module):
    """Frozen features beside those that train, in one region."""

    def __init__(self):
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)
        self.up, self.norm = nn.ConvTranspose2d(16, 32, 2, 2), nn.InstanceNorm2d(32)
        self.last = nn.Conv2d(32, 3, 1)

    def forward(self, x):
        x = self.stem(x)
        y = F.interpolate(self.down(x), scale_factor=2.0)
        return self.last(self.norm(self.up(torch.cat([x, y], 1))))


def test_frozen_features_that_a_region_reads_are_kept_as_codes():
    model, x = learned(Skip), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    (region,) = model.plan.regions
    assert "stem" in region.frozen
    features = 2 * 8 * 16 * 16
    assert kept(model, x).bytes < 2.5 * features
    expected = gradients(learned(Skip, exact=True), x)
    assert_relatively_close(gradients(model, x), expected, 0.02)


@pytest.mark.parametrize("exact", [False, True])
def test_a_value_that_only_leads_to_others_is_no_source(exact):
    x = torch.randn(2, 3, 16, 16, requires_grad=True)
    torch.manual_seed(0)
    network = DrawnAttention().eval()
    model = convert(network, DA3Config(memory=MemoryConfig(exact=exact)))

    def gradient(of):
        torch.manual_seed(1)
        return torch.autograd.grad(of(x).square().sum(), x)[0]

    assert_relatively_close(gradient(model), gradient(network), 1e-5 if exact else 0.02)
