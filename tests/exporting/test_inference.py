"""A domain's inference as a file computes what the model computes."""

import json

import pytest
import torch
from helpers.classifier import CLASSES
from helpers.domains import refused, shake_
from helpers.small import Functional, Residual
from torch import nn

from lightning_da3 import AdapterConfig, DA3Config, GateConfig, MemoryConfig, convert
from lightning_da3.errors import (
    CheckpointError,
    ConfigError,
    ConversionError,
    DA3Error,
    DomainError,
    InputError,
)
from lightning_da3.exporting import writing

SIZE = 16
SMALL = DA3Config(
    AdapterConfig(hidden_channels=4, max_cells=16, min_stride=1), GateConfig(target=0.5, by="cell")
)


class Smooth(nn.Sequential):
    """Smooth activations, a pool of cells that overlap, tokens."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3, 2, 1),
            nn.Hardswish(),
            nn.Conv2d(8, 8, 3, 1, 1),
            nn.SiLU(),
            nn.AvgPool2d(2),
            nn.Conv2d(8, 8, 3, 1, 1),
            nn.GELU(),
            nn.AdaptiveAvgPool2d(3),
            nn.Flatten(),
            nn.Linear(72, 8),
            nn.LayerNorm(8),
            nn.Linear(8, CLASSES),
        )


def learned(network, *names, config=SMALL):
    """A converted network with domains that add something."""
    torch.manual_seed(0)
    model = convert(network.eval(), config)
    for name in names:
        model.add_domain(name, num_classes=3)
        shake_(model, name)
    return model.eval()


def images(count, seed=0):
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def output(model, name, x):
    model.set_domain(name)
    with torch.no_grad():
        return model(x)


def close(found, expected):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def ran(path, **tensors):
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {name: x.detach().numpy() for name, x in tensors.items()})
    return torch.from_numpy(y)


@pytest.mark.slow
def test_a_program_of_torch(tmp_path):
    model = learned(Smooth(), "a", "b")
    path = model.export("a", tmp_path / "a.pt2", images(1), format="pt2")
    extra = {"lightning_da3.json": ""}
    program = torch.export.load(path, extra_files=extra).module()
    for count in (1, 5):
        close(program(images(count, 1))[0], output(model, "a", images(count, 1)))
    assert extra["lightning_da3.json"]
    about = json.loads((tmp_path / "a.pt2.json").read_text())
    assert (about["kind"], about["domain"], about["num_classes"]) == ("inference", "a", 3)
    assert about["inputs"] == [
        {"name": "input", "shape": ["batch", 3, SIZE, SIZE], "dtype": "float32"}
    ]
    assert about["outputs"] == [{"name": "output", "shape": ["batch", 3], "dtype": "float32"}]


@pytest.mark.slow
@pytest.mark.parametrize("network", [Smooth, Functional, Residual])
@pytest.mark.parametrize("exact", [False, True])
def test_onnx(network, exact, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    config = DA3Config(SMALL.adapter, None if exact else SMALL.gate, MemoryConfig(exact=exact))
    model = learned(network(), "a", config=config)
    path = model.export("a", tmp_path / "a.onnx", images(2))
    for count in (1, 3):
        close(ran(path, input=images(count, 1)), output(model, "a", images(count, 1)))
    file = onnx.load(path)
    assert not file.functions
    assert {node.domain for node in file.graph.node} == {""}
    inside = json.loads({p.key: p.value for p in file.metadata_props}["lightning_da3"])
    assert inside == json.loads((tmp_path / "a.onnx.json").read_text())
    assert inside["opset"] == file.opset_import[0].version
    assert inside["backbone"] == model.fingerprint


@pytest.mark.slow
@pytest.mark.parametrize("gated", [False, True])
def test_adapters_turn_no_map_around_and_write_into_no_part(gated, tmp_path):
    onnx = pytest.importorskip("onnx")
    config = SMALL if gated else DA3Config(SMALL.adapter)
    path = tmp_path / "a.onnx"
    model = learned(Residual(), "a", config=config)
    hosts = sum(len(part.hosts) for part in model.plan.parts)
    assert hosts
    model.export("a", path, images(2))
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert "Transpose" not in kinds
    assert "ScatterND" not in kinds
    assert kinds.count("LayerNormalization") == hosts  # of adapters


@pytest.mark.slow
def test_one_file_serves_all_domains(tmp_path):
    pytest.importorskip("onnxscript")
    model, x = learned(Residual(), "a", "b"), images(2)
    path = model.export("a", tmp_path / "any.onnx", x, domains="inputs")
    for name, count in (("a", 1), ("b", 3)):
        own, x = dict(model.domain(name).state_dict()), images(count, 1)
        close(ran(path, input=x, **own), output(model, name, x))
    ports = json.loads((tmp_path / "any.onnx.json").read_text())["inputs"]
    assert [port["name"] for port in ports] == ["input", *own]


@pytest.mark.slow
def test_a_program_of_torch_takes_any_domain(tmp_path):
    model, x = learned(Residual(), "a", "b"), images(3, 1)
    path = model.export("a", tmp_path / "a.pt2", x, format="pt2", domains="inputs")
    own = model.domain("b").state_dict()
    close(torch.export.load(path).module()(x, *own.values())[0], output(model, "b", x))


@pytest.mark.slow
def test_the_backbone_alone(tmp_path):
    pytest.importorskip("onnxscript")
    model, x = learned(Residual(), "a"), images(2)
    alone = model.export(None, tmp_path / "alone.onnx", x, dynamic_batch=False)
    close(ran(alone, input=x), output(model, None, x))


class Normed(nn.Module):
    """Divides by what is zero for black images, but for a tiny constant."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, bias=False), nn.Linear(4, CLASSES)

    def forward(self, x):
        x = self.conv(x).mean((2, 3))
        return self.fc(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-12))


@pytest.mark.slow
def test_tiny_constants_stay(tmp_path):
    pytest.importorskip("onnxscript")
    model, black = learned(Normed()), torch.zeros(2, 3, SIZE, SIZE)
    path = model.export(None, tmp_path / "alone.onnx", images(2))
    close(ran(path, input=black), output(model, None, black))


def test_bad_input(tmp_path, monkeypatch):
    model, x = learned(Residual(), "a"), images(2)

    def export(name="a", to=tmp_path / "a.pt2", inputs=x, **kwargs):
        model.export(name, to, inputs, **{"format": "pt2", **kwargs})

    with refused(DomainError, "no domain 'c'", "['a']"):
        export("c")
    with refused(ConfigError, "`format` must be one of ['onnx', 'pt2', 'executorch', ", "'tflite'"):
        export(format="tflite")
    with refused(ConfigError, "`domains` must be one of ['inside', 'inputs']"):
        export(domains="outside")
    with refused(ConfigError, "domains='inputs' needs a domain"):
        export(None, domains="inputs")
    with refused(InputError, "a tuple of tensors"):
        export(inputs=(x, 3))
    with refused(InputError, "dynamic_batch=False"):
        export(inputs=(x, torch.ones(3)))
    with refused(CheckpointError, "Cannot write", "there is no folder"):
        export(to=tmp_path / "none" / "a.pt2")
    with refused(CheckpointError, "it is a folder"):
        export(to=tmp_path)
    monkeypatch.setattr(writing.importlib.util, "find_spec", lambda name: None)
    with refused(DA3Error, "lightning-da3[export]", "'onnx'"):
        export(format="onnx")
    assert not list(tmp_path.iterdir())


class Counts(nn.Module):
    """Its control flow depends on values."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x):
        x = self.conv(x)
        if x.mean() > 0:
            x = x.relu()
        return self.fc(x.mean((2, 3)))


def test_what_stays_python_is_named(tmp_path):
    model = learned(Counts(), "a")
    with refused(ConversionError, "stay Python", "'the network'", "Rewrite"):
        model.export("a", tmp_path / "a.pt2", images(2), format="pt2")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_file_that_would_compute_something_else_is_refused(tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    rest = (nn.AvgPool2d(2, divisor_override=3), nn.Flatten(), nn.Linear(4 * 49, 3))
    model = learned(nn.Sequential(nn.Conv2d(3, 4, 3), *rest))
    old = tmp_path / "a.onnx"
    old.write_text("old")
    with refused(ConversionError, "computes another 'output'"):
        model.export(None, old, images(2))
    assert [file.name for file in tmp_path.iterdir()] == ["a.onnx"]
    assert old.read_text() == "old"


@pytest.mark.slow
def test_cells_of_unequal_sizes_are_products(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    head = (nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(72, CLASSES))
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU(), *head)
    model = learned(network, "a", config=DA3Config(AdapterConfig(4, max_cells=9, min_stride=1)))
    path = model.export("a", tmp_path / "a.onnx", images(2))
    for count in (1, 3):
        close(ran(path, input=images(count, 1)), output(model, "a", images(count, 1)))
    operations = [node.op_type for node in onnx.load(path).graph.node]
    assert "Gather" not in operations
    assert "MatMul" in operations
