"""Files of ExecuTorch compute what the model computes."""

import importlib
import json
import warnings

import pytest
import torch
from helpers.classifier import CLASSES
from helpers.domains import refused, shake_
from helpers.small import Functional
from torch import nn
from torch.nn import functional as F

from lightning_da3 import AdapterConfig, DA3Config, MemoryConfig, convert
from lightning_da3.errors import ConfigError, DA3Error
from lightning_da3.exporting import writing

SIZE, STEPS = 16, 30
MEASURED = ("operations", "planned_peak_bytes")  # once the file is made


def network():
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Hardswish(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.Conv2d(8, 8, 1), nn.SiLU()),
        *(nn.Conv2d(8, 8, 3), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(8, CLASSES),
    )


def learned(module, exact=False):
    """A converted network with a domain that adds something."""
    torch.manual_seed(0)
    adapter = AdapterConfig(hidden_channels=4, max_cells=16, min_stride=1)
    model = convert(module.eval(), DA3Config(adapter, memory=MemoryConfig(exact=exact)))
    model.add_domain("a", num_classes=3)
    shake_(model, "a")
    model.set_domain("a")
    return model


def images(count, seed):
    numbers = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, SIZE, SIZE, generator=numbers)
    return x, torch.randint(3, (count,), generator=numbers)


def loaded(path):
    """What runs the file, and what it says of itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the runtime's own, of what is experimental
        program = importlib.import_module("executorch.runtime").Runtime.get().load_program(path)
        said = json.loads(program.load_method("lightning_da3").execute([])[0])
        program.load_method("forward")
    beside = json.loads(path.with_name(path.name + ".json").read_text())
    assert beside["versions"].pop("executorch")
    assert said == {k: v for k, v in beside.items() if k not in MEASURED}
    return lambda *tensors: program.load_method("forward").execute(list(tensors)), beside


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "layout"),
    [("executorch", torch.channels_last), ("executorch-xnnpack", torch.contiguous_format)],
)
def test_inference(kind, layout, tmp_path):
    pytest.importorskip("executorch")
    model = learned(Functional()).eval().to(memory_format=layout)
    x = images(2, 0)[0].to(memory_format=layout)
    path = model.export("a", tmp_path / "a.pte", x, format=kind, dynamic_batch=False)
    run, said = loaded(path)
    x = images(2, 1)[0]
    (found,) = run(x)
    with torch.no_grad():
        torch.testing.assert_close(found, model(x), rtol=1e-5, atol=1e-6)
    assert said["planned_peak_bytes"] > 0
    assert ("XnnpackBackend" in said["operations"]) == kind.endswith("xnnpack")


CASES = [("executorch", False, "sgd"), ("executorch-xnnpack", True, "adam")]
REST = [("executorch-xnnpack", False, "sgd"), ("executorch", True, "adam")]


@pytest.mark.parametrize(
    ("kind", "exact", "optimizer"),
    [pytest.param(*case, marks=pytest.mark.slow) for case in CASES]
    + [pytest.param(*case, marks=pytest.mark.exhaustive) for case in REST],
)
def test_thirty_steps(kind, exact, optimizer, tmp_path):
    pytest.importorskip("executorch")
    model, rate = learned(network(), exact), {"sgd": 0.01, "adam": 0.001}[optimizer]
    own = dict(model.domain("a").named_parameters())
    path = model.export_training(
        *("a", tmp_path / "a.pte", images(2, 0)[0]),
        format=kind,
        optimizer=optimizer,
        dynamic_batch=False,
    )
    run, said = loaded(path)
    taken, given = ([p["name"] for p in said[side]] for side in ("inputs", "outputs"))
    state = {p["name"]: torch.zeros(p["shape"]) for p in said["inputs"]}
    state |= {name: p.detach().clone() for name, p in own.items()}
    eager = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer](own.values(), lr=rate)
    for i in range(STEPS):
        x, y = images(2, 1 + i)
        state |= {"input": x, "targets": y, "learning_rate": torch.tensor(rate)}
        state["step"] = torch.tensor(i + 1.0)
        found = dict(zip(given, run(*(state[name] for name in taken)), strict=True))
        loss = F.cross_entropy(model(x), y)
        assert found["loss"].item() == pytest.approx(loss.item(), rel=1e-4)
        state |= {k.removeprefix("new."): v for k, v in found.items() if k != "loss"}
        eager.zero_grad()
        loss.backward()
        eager.step()
    for name, parameter in own.items():
        now = parameter.detach()
        assert (now - state[name]).norm() <= 1e-4 * now.norm()


def test_batches_of_any_size_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(writing.importlib.util, "find_spec", lambda name: object())
    model = learned(network())
    with refused(ConfigError, "'executorch'", "dynamic_batch=False", "--batch-size N"):
        model.export("a", tmp_path / "a.pte", images(2, 0)[0], format="executorch")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(writing.importlib.util, "find_spec", lambda name: None)
    model = learned(network())
    with refused(DA3Error, "['executorch']", "lightning-da3[executorch]"):
        model.export_training(
            *("a", tmp_path / "a.pte", images(2, 0)[0]),
            format="executorch-xnnpack",
            dynamic_batch=False,
        )
    assert not [*tmp_path.iterdir()]
