"""A domain's training step as a file learns what the model learns."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.domains import refused, shake_
from torch import nn

from lightning_da3 import AdapterConfig, DA3Config, GateConfig, MemoryConfig, convert
from lightning_da3.device import Learner
from lightning_da3.errors import ConfigError, ConversionError, InputError
from lightning_da3.exporting import writing
from lightning_da3.exporting.optimizers import OPTIMIZERS, accumulating
from lightning_da3.exporting.program import Port, Program
from lightning_da3.exporting.steps import GivenNoise

SIZE, CLASSES, STEPS = 16, 3, 30
RATES = {"sgd": 0.01, "adam": 0.001}


def head():
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES)


def convolutions():
    """Every kind of activation, a pool, a stride."""
    first = (nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1), nn.Hardswish())
    rest = (nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, 1, 1), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.ReLU6())
    return nn.Sequential(*first, *rest, *head())


class Excited(nn.Module):
    def __init__(self):
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

    def forward(self, x):
        means = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.excite(F.silu(self.squeeze(means))))


def depthwise():
    """Depthwise convolutions with squeeze and excitation."""

    def block(side, stride):
        conv = nn.Conv2d(8, 8, side, stride, side // 2, groups=8)
        return conv, nn.BatchNorm2d(8), nn.SiLU(), Excited(), nn.Conv2d(8, 8, 1)

    first = (nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.SiLU())
    return nn.Sequential(*first, *block(3, 1), *block(5, 2), *head())


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mixed = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x):
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.mixed(x))


class Tokens(nn.Module):
    """A class token in front of patches."""

    def __init__(self):
        super().__init__()
        self.patches, self.first = nn.Conv2d(3, 8, 4, 4), nn.Parameter(torch.randn(1, 1, 8))
        self.blocks, self.head = nn.Sequential(Attends(), Attends()), nn.Linear(8, CLASSES)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.first.expand(x.shape[0], -1, -1), x), 1)
        return self.head(self.blocks(x)[:, 0])


def learned(network, gate=None, exact=False):
    """A converted network with a domain that adds something."""
    torch.manual_seed(0)
    adapter = AdapterConfig(hidden_channels=4, max_cells=16, min_stride=1)
    model = convert(network().eval(), DA3Config(adapter, gate, MemoryConfig(exact=exact)))
    model.add_domain("a", num_classes=CLASSES)
    shake_(model, "a")
    model.set_domain("a")
    model.gate_loss_scale = 1.0
    return model.train()


def batch(count, seed):
    numbers = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, SIZE, SIZE, generator=numbers)
    return x, torch.randint(CLASSES, (count,), generator=numbers)


NETWORKS = {
    "convolutions": (convolutions, GateConfig(target=0.5, by="cell"), "sgd"),
    "depthwise": (depthwise, None, "adam"),
    "tokens": (Tokens, GateConfig(target=0.5, noise=False, by="cell"), "sgd"),
}
CASES = [
    pytest.param(
        name,
        exact,
        marks=pytest.mark.slow
        if (name, exact) == ("convolutions", False)
        else pytest.mark.exhaustive,
    )
    for name in NETWORKS
    for exact in (False, True)
]


@pytest.mark.parametrize(("name", "exact"), CASES)
def test_thirty_steps_agree_with_eager_training(name, exact, tmp_path, monkeypatch):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    network, gate, optimizer = NETWORKS[name]
    model, rate = learned(network, gate, exact), RATES[optimizer]
    own = dict(model.domain("a").named_parameters())
    before = {key: parameter.detach().clone() for key, parameter in own.items()}
    path = model.export_training("a", tmp_path / "a.onnx", batch(2, 0)[0], optimizer=optimizer)
    check_file(onnx.load(path), json.loads((tmp_path / "a.onnx.json").read_text()), own)

    device = Learner(path)
    noise = GivenNoise({}, None, 4)  # to learn where every host's cells stand
    model.run_noisy("a", noise, batch(4, 0)[0])
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer]
    eager = kind(own.values(), lr=rate)
    for i in range(STEPS):
        x, y = batch((2, 5, 4)[i % 3], 1 + i)
        drawn = torch.randn(len(x), noise.columns, generator=torch.Generator().manual_seed(i))
        model.calls.here.noise = GivenNoise(noise.places, drawn)
        model.progress = 0.5
        monkeypatch.setattr(device, "_noise", lambda count, progress, drawn=drawn: drawn.numpy())
        loss = device.step(x.numpy(), y.numpy(), rate, progress=0.5)
        eager.zero_grad()
        expected = F.cross_entropy(model(x), y)
        expected.backward()
        eager.step()
        assert abs(loss - expected.item()) <= 1e-4 * expected.item()
    moved = 0.0
    for key, parameter in own.items():
        now, array = parameter.detach(), torch.from_numpy(device.tensors[key])
        assert (now - array).norm() <= 1e-4 * now.norm()
        moved = max(moved, float((now - before[key]).norm() / now.norm()))
    assert moved > 0.02
    device.save(tmp_path / "a.safetensors")
    name = model.load_domain(tmp_path / "a.safetensors", "from-the-device")
    for key, tensor in model.domain(name).state_dict().items():
        assert np.array_equal(tensor.numpy(), device.tensors[key])


@pytest.mark.slow
def test_samples_one_by_one_learn_what_their_batch_does(tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    model, (x, y) = learned(small), batch(3, 1)
    own = dict(model.domain("a").named_parameters())
    path = model.export_training(
        *("a", tmp_path / "a.onnx", x[:1]), optimizer="adam", accumulate=True, dynamic_batch=False
    )
    assert json.loads((tmp_path / "a.onnx.json").read_text())["accumulate"]
    device, eager = Learner(path), torch.optim.Adam(own.values(), lr=0.01)
    for _ in range(3):
        loss = F.cross_entropy(model(x), y)
        assert device.step(x.numpy(), y.numpy(), 0.01) == pytest.approx(loss.item(), rel=1e-4)
        loss.backward()
        eager.step()
        eager.zero_grad()
    for key, parameter in own.items():
        array = torch.from_numpy(device.tensors[key])
        assert (parameter.detach() - array).norm() <= 1e-4 * parameter.detach().norm()


def check_file(file, manifest, own):
    assert not file.functions
    assert {node.domain for node in file.graph.node} == {""}
    assert not any(node.metadata_props or node.doc_string for node in file.graph.node)
    assert manifest["kind"] == "training"
    assert manifest["optimizer"]["name"] in OPTIMIZERS
    names = [port["name"] for port in manifest["inputs"]]
    assert names[:2] == ["input", "targets"]
    assert {*own, "learning_rate"} <= {*names}
    outputs = [port["name"] for port in manifest["outputs"]]
    assert outputs[: len(own) + 1] == ["loss", *[f"new.{name}" for name in own]]


@pytest.mark.exhaustive
def test_a_step_as_a_program_of_torch_with_a_loss_of_ones_own(tmp_path):
    model, loss = learned(convolutions), nn.BCEWithLogitsLoss()
    own = dict(model.domain("a").named_parameters())
    x, targets = batch(2, 0)[0], torch.rand(2, CLASSES)
    path = model.export_training(
        *("a", tmp_path / "a.pt2", x), loss=loss, format="pt2", example_targets=targets
    )
    x, targets = batch(5, 1)[0], torch.rand(5, CLASSES)
    tensors = [p.detach() for p in own.values()]
    given = (x, targets, *tensors, torch.tensor(1.0))
    value, *new = torch.export.load(path).module()(*given)
    expected = loss(model(x), targets)
    expected.backward()
    torch.testing.assert_close(value, expected.detach())
    for parameter, tensor in zip(own.values(), new, strict=True):
        torch.testing.assert_close(
            tensor, parameter.detach() - parameter.grad, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("adds_up", [False, True])
def test_optimizers_are_those_of_torch(name, adds_up):
    parameter = nn.Parameter(torch.linspace(-1.0, 1.0, 5))
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[name]
    eager, state = kind([parameter], lr=0.1), {"p": parameter.detach().clone()}
    ours = accumulating(OPTIMIZERS[name]) if adds_up else OPTIMIZERS[name]
    state |= {port.name: port.example for port in ours.ports(state) if "." in port.name}
    for i in range(4):
        parameter.grad = torch.tensor([0.0, 1.0, -1e-4, 3.0, 0.5 * i])
        said = {"learning_rate": torch.tensor(0.1), "step": torch.tensor(i + 1.0)}
        for weight, applies in ((0.25, 0.0), (0.75, 1.0)) if adds_up else ((1.0, 1.0),):
            said |= {"weight": torch.tensor(weight), "apply": torch.tensor(applies)}
            before = state
            found = ours.update({"p": state["p"]}, {"p": parameter.grad}, {**state, **said})
            state = {key.removeprefix("new."): value for key, value in found.items()}
            if not applies:
                assert torch.equal(state["gradient.p"], 0.25 * parameter.grad)
                assert all(torch.equal(state[k], x) for k, x in before.items() if "grad" not in k)
        eager.step()
        torch.testing.assert_close(state["p"], parameter.detach(), rtol=1e-6, atol=1e-7)
        assert not adds_up or not state["gradient.p"].any()


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, CLASSES)

    def forward(self, x):
        x = self.conv(x).mean((2, 3))
        return self.fc(x), x


class Decides(Two):
    def forward(self, x):
        x = self.conv(x)
        return self.fc((x.relu() if x.mean() > 0 else x).mean((2, 3)))


def small():
    return nn.Sequential(nn.Conv2d(3, 8, 3), *head())


def decides(output, targets):
    return F.cross_entropy(output, targets) * (2 if output.mean() > 0 else 1)


def test_bad_input(tmp_path):
    model, x = learned(small), batch(2, 0)[0]

    def export(model=model, **kwargs):
        model.export_training("a", tmp_path / "a.pt2", x, **{"format": "pt2", **kwargs})

    with refused(ConfigError, "`optimizer` must be one of ['sgd', 'adam']", "'lamb'"):
        export(optimizer="lamb")
    with refused(ConfigError, "`accumulate` must be a bool, got 1"):
        export(accumulate=1)
    with refused(ConfigError, "`loss` must be one of ['cross_entropy']", "callable", "'mse'"):
        export(loss="mse")
    with refused(ConfigError, "`format` must be one of"):
        export(format="tflite")
    with refused(InputError, "one target for every sample"):
        export(example_targets=torch.zeros(7))
    with refused(ConversionError, "`loss` must give a tensor of one number", "shape (3,)"):
        export(loss=lambda output, targets: F.cross_entropy(output, targets, reduction="none"))
    with refused(ConversionError, "`loss` must give", "depends on the output"):
        export(loss=lambda output, targets: output.detach().sum())
    with refused(ConversionError, "gives 2 tensors"):
        export(learned(Two))
    with refused(ConversionError, "stay Python", "Rewrite"):
        export(learned(Decides))
    with refused(ConversionError, "cannot be exported", "the loss"):
        export(loss=decides)
    assert not list(tmp_path.iterdir())


def test_a_file_may_be_as_far_off_as_rounding_leaves_the_model():
    port = Port("new.a", torch.zeros(2))
    program = Program(None, [], [port])
    wanted, near = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.1])
    for nearby in ([[near]], [[wanted], [near]], [[near], [wanted]]):
        writing._check([wanted + 0.05], writing.Example([], [wanted], nearby), program, 1e-2)
    for example in (writing.Example([], [wanted]), writing.Example([], [wanted], [[wanted]])):
        writing._check([wanted + 0.005], example, program, 1e-2)
        with refused(ConversionError, "computes another 'new.a'"):
            writing._check([wanted + 0.05], example, program, 1e-2)
    with refused(ConversionError, "computes another 'new.a'"):
        writing._check([wanted + 0.2], writing.Example([], [wanted], [[near]]), program, 1e-2)
    stepped = Program(None, [Port("a", torch.zeros(2))], [port])  # almost to zero
    for before, off in ((2.0, 0.015), (1.0, 0.009)):
        example = writing.Example([torch.tensor([before, 0.0])], [wanted * 0.01])
        writing._check([wanted * 0.01 + off], example, stepped, 1e-2)
        with refused(ConversionError, "computes another 'new.a'"):
            writing._check([wanted * 0.01 + 2 * off], example, stepped, 1e-2)


@pytest.mark.slow
def test_a_fixed_batch_has_a_planned_peak(tmp_path):
    pytest.importorskip("onnxscript")
    model = learned(small)
    model.export_training("a", tmp_path / "a.onnx", batch(4, 0)[0], dynamic_batch=False)
    peak = json.loads((tmp_path / "a.onnx.json").read_text())["planned_peak_bytes"]
    images = 4 * 3 * SIZE * SIZE * 4
    maps = 4 * 8 * (SIZE - 2) ** 2 * 4
    assert images + maps < peak < images + 4 * maps


@pytest.mark.slow
def test_nothing_but_an_activation_reads_what_it_reads(tmp_path):
    """So that runtimes join it with its convolution; masks are made of what it gives."""
    onnx = pytest.importorskip("onnx")
    blocks = [part for _ in range(3) for part in (nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU6())]
    model = convert(nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), *blocks, *head()))
    model.add_domain("learned", num_classes=CLASSES)
    images = torch.randn(2, 3, SIZE, SIZE)
    path = model.export_training("learned", tmp_path / "step.onnx", images, dynamic_batch=False)
    nodes = onnx.load(path).graph.node
    clipped = {node.input[0] for node in nodes if node.op_type == "Clip"}
    made = {v for node in nodes if node.op_type in ("Conv", "Add") for v in node.output}
    assert len(clipped & made) >= 3
    for name in clipped & made:
        assert [n.op_type for n in nodes if name in n.input] == ["Clip"]
