"""Weights that rest in bfloat16: what they save, and that nothing else changes."""

import copy
import pickle

import pytest
import torch
import torch._dynamo
import torchvision
from helpers import zoo
from helpers.comparing import (
    add,
    assert_gradients_close,
    assert_relatively_close,
    leaves,
    mix_gates_,
    score,
)
from helpers.lit import CONFIG as LIT_CONFIG
from helpers.lit import data, lit, trainer
from torch import nn

from lightning_da3 import (
    AdapterConfig,
    CheckpointError,
    DA3Callback,
    DA3Config,
    GateConfig,
    MemoryConfig,
    convert,
)
from lightning_da3.converting import compared
from lightning_da3.memory import StepPredictor, measure_step, saved_activation_bytes
from lightning_da3.nn.linear import FrozenAttention, FrozenLinear
from lightning_da3.ops.linear import frozen_linear

ADAPTER = AdapterConfig(hidden_channels=4, max_cells=16, min_stride=1)
HALF, EXACT_HALF = (MemoryConfig(exact=exact, weights="bfloat16") for exact in (False, True))
NETWORKS = (
    "StandardisedWeights Transposed SqueezeExcite Norms LayerScale Volumes VisionTransformer "
    "EncoderLayers MLP CrossAttention FunctionsWithOwnWeights TiedWeights Hooks Detector"
).split()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def converted(name, memory, domain="a"):
    config = DA3Config(ADAPTER, GateConfig(target=0.5, by="cell"), memory, head=None)
    model = convert(zoo.network(name), config)
    torch.manual_seed(1)
    add(model, domain)
    model.set_domain(domain)
    return model.train()


def resting(model):
    return {n: p for n, p in model.backbone.named_parameters() if p.dtype == torch.bfloat16}


def gradients(model, name):
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad(score(model(*zoo.batch(name))), trained, allow_unused=True)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.slow
def test_all_is_as_with_weights_that_were_rounded_before(name):
    rested = converted(name, EXACT_HALF)
    rounded = converted(name, MemoryConfig(exact=True))
    plain = dict(rounded.backbone.named_parameters())
    for key, weight in resting(rested).items():
        assert plain[key].dtype == torch.float32
        assert torch.equal(plain[key].bfloat16(), weight)  # rounded once
        plain[key].data.copy_(weight)
    for got, want in zip(
        leaves(rested(*zoo.batch(name))), leaves(rounded(*zoo.batch(name))), strict=True
    ):
        assert got.dtype == want.dtype
        assert_relatively_close(got, want, 1e-5)
    for got, want in zip(gradients(rested, name), gradients(rounded, name), strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            assert_relatively_close(got, want, 1e-4)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("memory", ["default", "exact"])
@pytest.mark.slow
def test_nothing_more_is_kept_for_the_backward(name, memory):
    exact = memory == "exact"
    models = [converted(name, MemoryConfig(exact, weights=w)) for w in ("same", "bfloat16")]
    plain, rested = (saved_activation_bytes(model, *zoo.batch(name)) for model in models)
    assert rested <= plain


@pytest.mark.parametrize("name", ["Transposed", "VisionTransformer", "EncoderLayers", "MLP"])
def test_what_rests(name):
    model = converted(name, HALF)
    assert resting(model)
    for key, parameter in model.named_parameters():
        is_weight = key.startswith("backbone.") and parameter.dim() > 1 and "weight" in key
        if parameter.dtype == torch.bfloat16:
            assert is_weight, key
    assert {p.dtype for p in model.bank.parameters()} == {torch.float32}
    assert model.dtype == torch.float32


class Tokens(nn.Module):
    """Attention in all of PyTorch's own words."""

    def __init__(self, masked=False):
        super().__init__()
        self.masked = masked
        self.embed = nn.Linear(6, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.last = nn.MultiheadAttention(8, 2, bias=False)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8, bias=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.embed(x)
        mask = torch.ones(5, 5).triu(1).bool() if self.masked else None
        x = x + self.attention(x, x, x, need_weights=False, attn_mask=mask)[0]
        x = x + self.down(self.up(x).relu())
        y = x.transpose(0, 1)
        return self.head(self.last(y, y, y, need_weights=False)[0].mean(0))


def test_half_of_a_network_of_tokens_is_saved_but_for_biases_and_head():
    network = Tokens()
    model = convert(network, DA3Config(adapter=ADAPTER, memory=HALF))
    kinds = [type(layer) for layer in model.backbone.modules()]
    assert kinds.count(FrozenAttention) == 2
    assert kinds.count(FrozenLinear) == 3 + 1
    assert model.backbone.head.original.weight.dtype == torch.float32
    weights = sum(p.nbytes for n, p in network.named_parameters() if p.dim() > 1)
    head = network.head.weight.nbytes
    saved = sum(p.nbytes for p in network.parameters()) - sum(
        p.nbytes for p in model.backbone.parameters()
    )
    assert saved == (weights - head) / 2
    x = torch.randn(2, 5, 6)
    torch.testing.assert_close(model(x), network.eval()(x), rtol=0.02, atol=0.02)


class Tied(nn.Module):
    """Reads a layer's weight beside calling it, and has another with the same weight."""

    def __init__(self):
        super().__init__()
        self.once, self.read = nn.Linear(6, 6), nn.Linear(6, 6)
        self.one, self.other, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.other.weight = self.one.weight

    def forward(self, x):
        x = self.read(self.once(x).relu()) + self.read.weight.mean()
        return self.head(self.other(self.one(x).relu()))


def test_tensors_that_have_other_uses_do_not_rest():
    network = Tied()
    model = convert(network, DA3Config(adapter=ADAPTER, memory=HALF))
    assert resting(model).keys() == {"once.weight"}
    x = torch.randn(4, 6)
    torch.testing.assert_close(model(x), network.eval()(x), rtol=0.02, atol=0.02)


def test_attention_that_is_more_than_that_does_not_rest():
    model = convert(Tokens(masked=True), DA3Config(adapter=ADAPTER, memory=HALF))
    types = [m.in_proj_weight.dtype for m in (model.backbone.attention, model.backbone.last)]
    assert types == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 4, 3)])
@pytest.mark.parametrize("biased", [True, False])
def test_gradients_of_a_resting_linear_map(dtype, shape, biased):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 3).to(dtype)
    bias = torch.randn(5, dtype=torch.float64) if biased else None
    assert torch.autograd.gradcheck(lambda x: frozen_linear(x, weight, bias), (x,))
    want = nn.functional.linear(x, weight.double(), bias)
    torch.testing.assert_close(frozen_linear(x, weight, bias), want)
    assert saved_activation_bytes(lambda: frozen_linear(x, nn.Parameter(weight), bias)) == 0


def test_the_backbones_own_state_loads():
    network, donor = zoo.network("VisionTransformer"), zoo.network("VisionTransformer")
    for parameter in donor.parameters():
        parameter.data.add_(0.01)
    config = DA3Config(adapter=ADAPTER, memory=HALF)
    model, want = convert(network, config), convert(donor, config)
    model.load_state_dict(donor.state_dict())
    for key, value in want.backbone.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[key], value), key
    assert model.fingerprint == want.fingerprint


@pytest.mark.parametrize("weights", ["same", "bfloat16"])
def test_a_domain_fits_its_own_kind_of_weights_only(tmp_path, weights):
    config = {w: DA3Config(adapter=ADAPTER, memory=MemoryConfig(weights=w)) for w in WEIGHTS}
    other = next(w for w in WEIGHTS if w != weights)
    model, same, foreign = (
        convert(zoo.network("SqueezeExcite"), config[w]) for w in (weights, weights, other)
    )
    model.add_domain("a", 3)
    model.save_domain("a", tmp_path / "a.safetensors")
    same.load_domain(tmp_path / "a.safetensors")
    same.load_state_dict(model.state_dict())
    message = rf"MemoryConfig\(weights='{weights}'\), here it is '{other}'"
    with pytest.raises(CheckpointError, match=message):
        foreign.load_domain(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=message):
        foreign.load_state_dict(model.state_dict())
    assert foreign.domains == []


WEIGHTS = ("same", "bfloat16")


def test_files_from_before_the_option_are_of_unrounded_weights(tmp_path, monkeypatch):
    plain, half = (
        convert(zoo.network("SqueezeExcite"), DA3Config(adapter=ADAPTER, memory=memory))
        for memory in (MemoryConfig(), HALF)
    )
    plain.add_domain("a", 3)
    config = plain.config.to_dict()
    del config["memory"]["weights"]
    with monkeypatch.context() as patch:
        patch.setattr(DA3Config, "to_dict", lambda _: config)
        plain.save_domain("a", tmp_path / "a.safetensors")
    plain.load_domain(tmp_path / "a.safetensors", "again")
    with pytest.raises(CheckpointError, match="rounded weights are another backbone"):
        half.load_domain(tmp_path / "a.safetensors")


def test_copies_and_types(tmp_path):
    model = converted("VisionTransformer", HALF)
    x = zoo.batch("VisionTransformer")
    want = model.eval()(*x)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(*x), want)
        assert resting(again).keys() == resting(model).keys()
    double = copy.deepcopy(model).double()
    double.add_domain("b")
    assert double.dtype == torch.float64
    assert_relatively_close(
        double(*zoo.batch("VisionTransformer", torch.float64)).float(), want, 1e-5
    )
    low = copy.deepcopy(model).bfloat16()
    low.add_domain("b")
    assert low.dtype == torch.bfloat16
    assert low(*[t.bfloat16() for t in x]).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["SqueezeExcite", "VisionTransformer"])
def test_autocast(name):
    model = converted(name, HALF)
    mix_gates_(model, zoo.batch(name))
    want = gradients(model, name)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = leaves(model(*zoo.batch(name)))
    got = torch.autograd.grad(
        score([leaf.float() for leaf in outputs]),
        [p for p in model.parameters() if p.requires_grad],
    )
    assert_gradients_close(got, want, 0.2)


@pytest.mark.filterwarnings("ignore")  # of the compiler about itself
@pytest.mark.slow
def test_compiled_convolutions_keep_no_copies():
    torch._dynamo.reset()
    name = "Transposed"
    model, x = converted(name, HALF), zoo.batch(name)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    got = torch.autograd.grad(score(compiled(*x)), trained)
    for one, other in zip(got, gradients(model, name), strict=True):
        assert_relatively_close(one, other, 1e-4)
    assert saved_activation_bytes(compiled, *x) <= 1.1 * saved_activation_bytes(model, *x)


@pytest.mark.slow
def test_the_predicted_peak_counts_the_copies():
    network = nn.Sequential(
        nn.Conv2d(3, 256, 3, stride=2),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, stride=2),
        nn.Flatten(),
        nn.Linear(2304, 256),
        nn.ReLU(),
        nn.Linear(256, 3),
    )
    x, peaks = torch.rand(2, 3, 16, 16), {}
    for memory in (MemoryConfig(), HALF):
        model = convert(network, DA3Config(adapter=ADAPTER, memory=memory))
        model.add_domain("a", 3)
        model.set_domain("a")
        model.train()

        def step(model=model):
            nn.functional.cross_entropy(model(x), torch.tensor([0, 1])).backward()
            model.zero_grad()

        peaks[memory] = measure_step(step, repeats=0).peak_bytes
        assert StepPredictor(model)(x).peak_bytes == pytest.approx(peaks[memory], rel=0.1)
    copied = 4 * network[2].weight.numel()  # one layer's at a time
    assert peaks[HALF] - peaks[MemoryConfig()] <= 1.1 * copied


def test_the_model_says_so():
    assert "weights='bfloat16': the backbone is rounded once" in repr(converted("MLP", HALF))
    assert "rounded" not in repr(converted("MLP", MemoryConfig()))


def test_an_example_may_differ_by_the_rounding():
    network = zoo.network("SqueezeExcite")
    convert(network, DA3Config(adapter=ADAPTER, memory=HALF), zoo.batch("SqueezeExcite"))


def test_in_a_trainer(tmp_path):
    module = lit()
    config = DA3Config(LIT_CONFIG.adapter, LIT_CONFIG.gate, memory=HALF)
    da3 = DA3Callback("a", 2, config)
    trainer(tmp_path, da3).fit(module, data())
    before = {k: v.clone() for k, v in convert(lit().net, config).backbone.state_dict().items()}
    for key, value in module.net.backbone.state_dict().items():
        assert torch.equal(value, before[key])
    assert any(v.any() for k, v in module.net.domain("a").state_dict().items() if "value" in k)
    assert da3.first_steps.predicted is not None


def test_what_rounding_does_to_gradients_of_the_network_itself_is_no_reason_for_blame():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network, x = torchvision.models.resnet50(num_classes=10), torch.randn(2, 3, 64, 64)
    model, found = compared(network, DA3Config(memory=EXACT_HALF), x)
    assert all(comparison.ok for comparison in found)
    assert not model.plan.python
    gradients = [c for c in found if c.name.startswith("gradients, eval")]
    assert all(c.difference > 0.3 for c in gradients)  # more than is allowed otherwise
