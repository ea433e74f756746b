"""Networks with a domain, their files, and what a device does with those."""

from __future__ import annotations

import copy
import importlib
import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from comparison.backbones import LITE0, lite0
from measure import CLASSES, build
from torch import Tensor, nn

from lightning_da3 import DA3Config, DA3Model, convert
from lightning_da3.exporting.inference import Format

TINY = "tiny"
Arrays = dict[str, np.ndarray]


def network_of(name: str, image_size: int) -> nn.Module:
    """A network in eval mode for `CLASSES` classes, its activations as large as trained ones'."""
    torch.manual_seed(0)
    if name == LITE0:
        return lite0(image_size).with_head(CLASSES).eval()
    network = tiny() if name == TINY else build(name, image_size)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None  # the mean of what it meets
    with torch.no_grad():
        network.train()(torch.randn(8, 3, image_size, image_size))
    return network.eval()


def tiny() -> nn.Module:
    """A few convolutions."""
    first = (nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1))
    rest = (nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.Hardswish(), nn.Conv2d(16, 16, 3, 1, 1))
    return nn.Sequential(*first, *rest, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def learned(network: nn.Module, config: DA3Config | None = None) -> DA3Model:
    """The network converted, with an active domain that adds something."""
    model = convert(network, config)
    model.add_domain("measured", num_classes=CLASSES)
    numbers = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.domain("measured").parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=numbers))
    model.set_domain("measured")
    return model


def session_of(file: Path | bytes, **options: bool) -> onnxruntime.InferenceSession:
    """A session with as many threads as PyTorch has."""
    chosen = onnxruntime.SessionOptions()
    chosen.intra_op_num_threads = torch.get_num_threads()
    chosen.log_severity_level = 3
    for name, value in options.items():
        setattr(chosen, name, value)
    return onnxruntime.InferenceSession(file, chosen, providers=["CPUExecutionProvider"])


class Device:
    """Steps of a training file: a runtime and arrays, nothing else.

    Args:
        shapes: Of what the file takes, by name.
        run: From these arrays to those that come out, by name.
        tensors: Of the domain.
    """

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        run: Callable[[Arrays], Arrays],
        tensors: Mapping[str, Tensor],
    ) -> None:
        self.shapes, self.run = shapes, run
        self.state = {n: t.detach().numpy().copy() for n, t in tensors.items() if n in shapes}
        for name, shape in shapes.items():
            if name.startswith("moment"):
                self.state[name] = np.zeros(shape, np.float32)

    def step(self, images: Tensor, labels: Tensor, rate: float, number: int) -> None:
        said = {"learning_rate": rate, "step": number, "gate_target": 0.5}
        given = {n: np.asarray(v, np.float32) for n, v in said.items() if n in self.shapes}
        given |= {"input": images.numpy(), "targets": labels.numpy()}
        found = self.run({**given, **self.state})
        self.state = {name: found[f"new.{name}"] for name in self.state}


def onnx_device(file: Path | bytes, tensors: Mapping[str, Tensor], **options: bool) -> Device:
    """A file in ONNX Runtime."""
    session = session_of(file, **options)
    outputs = [port.name for port in session.get_outputs()]

    def run(given: Arrays) -> Arrays:
        return dict(zip(outputs, session.run(outputs, given), strict=True))

    return Device({port.name: port.shape for port in session.get_inputs()}, run, tensors)


def executorch_device(path: Path, tensors: Mapping[str, Tensor]) -> Device:
    """A file in ExecuTorch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is experimental
        runtime: Any = importlib.import_module("executorch.runtime")
        program = runtime.Runtime.get().load_program(path)
    about = json.loads(Path(f"{path}.json").read_text())
    shapes = {port["name"]: port["shape"] for port in about["inputs"]}
    outputs = [port["name"] for port in about["outputs"]]

    def run(given: Arrays) -> Arrays:
        # `program` is to be kept while its methods run
        found = program.load_method("forward").execute([torch.from_numpy(given[n]) for n in shapes])
        return {name: y.numpy() for name, y in zip(outputs, found, strict=True)}

    return Device(shapes, run, tensors)


def after_steps(
    model: DA3Model,
    batches: Sequence[tuple[Tensor, Tensor]],
    kind: Callable[..., torch.optim.Optimizer],
    rate: float,
) -> Arrays:
    """The active domain's parameters after steps in PyTorch; the model stays as it is."""
    model = copy.deepcopy(model).train()
    optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=rate)
    for images, labels in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return {n: p.detach().numpy() for n, p in model.domain("measured").named_parameters()}


def apart_by(expected: Arrays, found: Arrays) -> tuple[float, float]:
    """How far off the worst tensor is, and all of them as one vector; of what is expected."""
    off, size = [], []
    for name, values in expected.items():
        off.append(float(np.linalg.norm(values.astype(np.float64) - found[name])))
        size.append(float(np.linalg.norm(values)))
    worst = max(a / b for a, b in zip(off, size, strict=True))
    return worst, float(np.linalg.norm(off) / np.linalg.norm(size))


def batch(count: int, image_size: int, seed: int) -> tuple[Tensor, Tensor]:
    numbers = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, image_size, image_size, generator=numbers)
    return images, torch.randint(CLASSES, (count,), generator=numbers)


def training_file(
    model: DA3Model,
    folder: Path,
    count: int,
    image_size: int,
    optimizer: str,
    format: Format = "onnx",  # noqa: A002 - as in `export_training`
) -> tuple[Path, float]:
    """A training step for batches of `count`, and the seconds that it took to write."""
    start = time.perf_counter()
    path = model.export_training(
        "measured",
        folder / f"{optimizer}_{count}",
        batch(count, image_size, 0)[0],
        optimizer=optimizer,
        format=format,
        dynamic_batch=False,
    )
    return path, time.perf_counter() - start


def original(network: nn.Module, examples: Tensor, path: Path) -> Path:
    """The user's network as torch's own exporter writes it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        any_batch = ({0: torch.export.Dim("batch", min=1)},)
        made: Any = torch.onnx.export(
            network,
            (examples,),
            dynamo=True,
            verbose=False,
            input_names=["input"],
            dynamic_shapes=any_batch,
            opset_version=20,
        )
        made.save(path)
    return path
