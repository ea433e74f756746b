"""Files for devices, measured: what they compute, how long that takes, and what memory they need.

Inference: a domain's outputs in ONNX Runtime beside those in PyTorch, and the time beside that of
the original network in ONNX Runtime, whose own outputs may be as far off; then sizes and times with
weights in bfloat16, and in 8 bits by the runtime's own quantizer. Training: a domain's parameters
after steps in ONNX Runtime beside those after the same steps in PyTorch, with data that the file
was not exported with; all tensors of the domain as one vector, and the worst of them. Beside that,
how far PyTorch's own go apart when images are off by 1e-7 of their values, as rounding is: what it
decides otherwise adds up, and a file may be off twice as far. Time: one step of SGD in ONNX
Runtime, of DA3 and of fine-tuning in PyTorch, each of these in its faster memory format; all take
turns in one process, and medians count. Memory: the most that tensors hold at once in the order of
the file, as its manifest says; and what a process takes from the system above the loaded file while
steps run, without an arena, and also without buffers that are kept for others of their size.
ExecuTorch, where it is installed: agreement, arena and time of steps of a tiny network and of
MobileNetV2, on its portable kernels and with XNNPACK, which has memory of its own. Every network
has a process of its own. Weights are random, with batch norms that have met images; EfficientNet-
Lite0 has its own. Times depend on the machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import onnxruntime
import torch
from comparison.backbones import LITE0
from device_files import (
    TINY,
    after_steps,
    apart_by,
    batch,
    executorch_device,
    learned,
    network_of,
    onnx_device,
    original,
    session_of,
    training_file,
)
from device_rows import Row, Sizes, table
from device_smaller import smaller
from measure import FORMATS, Step, alternate, apart, processor, sgd
from torch import Tensor, nn

from lightning_da3.exporting.inference import Format

PARTS = ("inference", "smaller", "training", "time", "memory", "executorch")
MODELS = ["resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0", LITE0, "vit_b_16"]
NOT_TRAINED = "convnext_tiny"
IN_EXECUTORCH = (TINY, "mobilenet_v2")
FAST = ("resnet50", "mobilenet_v2", "efficientnet_b0")
OPTIMIZERS = {"sgd": (torch.optim.SGD, 0.01), "adam": (torch.optim.Adam, 0.001)}
RATES = {"efficientnet_b0": {"sgd": 1e-4}}  # at 0.001 it diverges, in PyTorch as well
KINDS: tuple[Format, ...] = ("executorch", "executorch-xnnpack")
MIB = 2**20
ROUNDING = 1e-7  # of a value, in float32


# --- inference ------------------------------------------------------------------------------------


def inference(name: str, sizes: Sizes) -> list[Row]:
    """Outputs beside PyTorch's, time beside the original network's."""
    network = network_of(name, sizes.image)
    model = learned(network).eval()
    examples, _ = batch(2, sizes.image, 0)
    with tempfile.TemporaryDirectory() as folder:
        path = model.export("measured", Path(folder) / "domain.onnx", examples)
        ours = session_of(path)
        plain = session_of(original(network, examples, Path(folder) / "original.onnx"))
        images, _ = batch(3, sizes.image, 1)
        own, off = outputs_off(plain, network, images), outputs_off(ours, model, images)
        rows = [
            Row(
                name, "inference: off, of the largest output", off, asked=max(1e-5, min(own, 1e-4))
            ),
            Row(name, "inference: off, of the original's", own),
        ]
        for count, words in {1: "one image", 8: "eight images"}.items():
            fed = {"input": batch(count, sizes.image, 2)[0].numpy()}
            runs: dict[str, Callable[[], object]] = {
                "ours": partial(ours.run, None, fed),
                "original": partial(plain.run, None, fed),
            }
            times = {run: time.cpu_ms for run, time in alternate(runs, sizes.rounds).items()}
            ratio = times["ours"] / times["original"]
            rows += [
                Row(name, f"inference: {words}, of the original's", ratio, asked=1.05),
                Row(name, f"inference: {words}", times["ours"], "ms"),
            ]
    return rows


@torch.inference_mode()
def outputs_off(session: onnxruntime.InferenceSession, network: nn.Module, images: Tensor) -> float:
    """How far a file's outputs are from the network's, of the largest."""
    expected = network(images)
    found = torch.from_numpy(session.run(None, {"input": images.numpy()})[0])
    return float((found - expected).abs().max() / expected.abs().max())


# --- training -------------------------------------------------------------------------------------


def training(name: str, sizes: Sizes) -> list[Row]:
    """Parameters after the same steps in both, for either optimizer; the file's size."""
    network, rows = network_of(name, sizes.image), []
    for optimizer, (kind, rate) in OPTIMIZERS.items():
        rate = RATES.get(name, {}).get(optimizer, rate)
        model = learned(network)
        with tempfile.TemporaryDirectory() as folder:
            path, seconds = training_file(model, Path(folder), 2, sizes.image, optimizer)
            if optimizer == "sgd":
                held = sum(p.nbytes for p in network.parameters())
                size = path.stat().st_size / held
                rows.append(Row(name, "training: the file, of the weights", size, asked=1.02))
                rows.append(Row(name, "training: export", seconds, "s", 180.0))
            file = path.read_bytes()
        batches = [batch(2, sizes.image, 1 + i) for i in range(sizes.steps)]
        numbers = torch.Generator().manual_seed(0)
        nearby = [
            (x * (1 + ROUNDING * torch.randn(x.shape, generator=numbers)), y) for x, y in batches
        ]
        for count in (1, sizes.steps):
            device = onnx_device(file, dict(model.domain("measured").named_parameters()))
            for i, (images, labels) in enumerate(batches[:count]):
                device.step(images, labels, rate, i + 1)
            own = after_steps(model, batches[:count], kind, rate)
            rounding = apart_by(own, after_steps(model, nearby[:count], kind, rate))[1]
            worst, whole = apart_by(own, device.state)
            what = f"training: {optimizer}, {count} steps: parameters"
            rows += [
                Row(name, f"{what} off", whole, asked=max(1e-4, 2 * rounding)),
                Row(name, f"{what} off, worst tensor", worst),
                Row(name, f"{what} off in PyTorch, images off by 1e-7", rounding),
            ]
    return rows


# --- time -----------------------------------------------------------------------------------------


def step_times(name: str, sizes: Sizes, counts: Sequence[int] = (1, 4)) -> list[Row]:
    """One step in ONNX Runtime beside DA3's and fine-tuning's in PyTorch."""
    network, rows = network_of(name, sizes.image), []
    for count in counts:
        images, labels = batch(count, sizes.image, 1)
        model = learned(network)
        with tempfile.TemporaryDirectory() as folder:
            path, _ = training_file(model, Path(folder), count, sizes.image, "sgd")
            device = onnx_device(path, dict(model.domain("measured").named_parameters()))
        steps: dict[str, Callable[[], object]] = {
            "file": lambda d=device, x=images, y=labels: d.step(x, y, 1e-4, 1)
        }
        for layout, memory_format in FORMATS.items():
            x = images.contiguous(memory_format=memory_format)
            tuned = network_of(name, sizes.image).to(memory_format=memory_format).train()
            steps[f"tuned {layout}"] = Step(tuned, x, labels, sgd)
            ours = learned(network).to(memory_format=memory_format).train()
            steps[f"DA3 {layout}"] = Step(ours, x, labels, sgd)
        times = alternate(steps, sizes.rounds)
        file = times["file"].cpu_ms
        eager, tuned_ms = (
            min(times[f"{kind} {layout}"].cpu_ms for layout in FORMATS) for kind in ("DA3", "tuned")
        )
        fast = 2.5 if count == 1 and name in FAST else None
        asked = {1: 0.6, 4: 0.8}.get(count)
        about = f"time, batch {count}:"
        rows += [
            Row(name, f"{about} a step in ONNX Runtime", file, "ms"),
            Row(name, f"{about} DA3 in PyTorch", eager, "ms"),
            Row(name, f"{about} fine-tuning in PyTorch", tuned_ms, "ms"),
            Row(name, f"{about} ONNX Runtime, of DA3 in PyTorch", file / eager, asked=asked),
            Row(name, f"{about} faster than fine-tuning", tuned_ms / file, "x", fast, least=True),
        ]
    return rows


# --- memory ---------------------------------------------------------------------------------------


def memory(name: str, sizes: Sizes) -> list[Row]:
    """The planned peak of a step of a batch of 4, and what its process takes."""
    count = 4
    model = learned(network_of(name, sizes.image))
    own = dict(model.domain("measured").named_parameters())
    with tempfile.TemporaryDirectory() as folder:
        path, _ = training_file(model, Path(folder), count, sizes.image, "sgd")
        planned = json.loads(Path(f"{path}.json").read_text())["planned_peak_bytes"]
        os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what glibc frees goes back, and is seen
        taken = apart(resident, path, own, count, sizes.image, True)
        least = apart(resident, path, own, count, sizes.image, False)
    asked = 24.0 if (name, sizes.image) == ("mobilenet_v2", 224) else None
    share = None if asked is None else 1.5
    return [
        Row(name, "memory, batch 4: planned peak", planned / MIB, "MiB", asked),
        Row(name, "memory, batch 4: resident, arena off", taken / MIB, "MiB"),
        Row(name, "memory, batch 4: that, of the planned peak", taken / planned),
        Row(name, "memory, batch 4: resident, arena and reuse off", least / MIB, "MiB"),
        Row(name, "memory, batch 4: that, of the planned peak", least / planned, asked=share),
    ]


def resident(
    path: Path, own: Mapping[str, Tensor], count: int, image_size: int, reuse: bool
) -> int:
    """The most bytes that this process holds above the loaded file while three steps run."""
    device = onnx_device(
        path, own, enable_cpu_mem_arena=False, enable_mem_pattern=False, enable_mem_reuse=reuse
    )
    images, labels = batch(count, image_size, 1)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is now
    for i in range(3):
        device.step(images, labels, 1e-4, i + 1)
    return _status("VmHWM") - before


def _status(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what))


# --- executorch ----------------------------------------------------------------------------------


def executorch(name: str, sizes: Sizes) -> list[Row]:
    """Parameters after the same steps in ExecuTorch, its arena, and the time of a step."""
    network, rows = network_of(name, sizes.image), []
    held = sum(p.nbytes for p in network.parameters())
    for kind in KINDS:
        model = learned(network)
        own = dict(model.domain("measured").named_parameters())
        with tempfile.TemporaryDirectory() as folder:
            path, seconds = training_file(model, Path(folder), 2, sizes.image, "sgd", kind)
            size = path.stat().st_size / held
            arena = json.loads(Path(f"{path}.json").read_text())["planned_peak_bytes"]
            device = executorch_device(path, own)
            batches = [batch(2, sizes.image, 1 + i) for i in range(sizes.steps)]
            for i, (images, labels) in enumerate(batches):
                device.step(images, labels, 0.01, i + 1)
            there = after_steps(model, batches, torch.optim.SGD, 0.01)
            off = apart_by(there, device.state)[1]
            images, labels = batches[0]
            runs: dict[str, Callable[[], object]] = {
                "file": partial(device.step, images, labels, 1e-4, 1),
                "DA3": Step(model.train(), images, labels, sgd),
            }
            times = alternate(runs, sizes.rounds)
        about = f"{kind}, batch 2:"
        asked = 1e-4 if name == TINY else None
        rows += [
            Row(name, f"{about} {sizes.steps} steps of sgd, parameters off", off, asked=asked),
            Row(name, f"{about} arena", arena / MIB, "MiB"),
            Row(name, f"{about} the file, of the weights", size),
            Row(name, f"{about} export", seconds, "s"),
            Row(name, f"{about} a step", times["file"].cpu_ms, "ms"),
            Row(name, f"{about} DA3 in PyTorch", times["DA3"].cpu_ms, "ms"),
        ]
    return rows


# --- the command ----------------------------------------------------------------------------------


def applies(part: str, name: str) -> bool:
    """Whether a network has that part."""
    if part == "executorch":
        return name in IN_EXECUTORCH and importlib.util.find_spec("executorch") is not None
    return name != TINY and (part == "inference" or name != NOT_TRAINED)


def main() -> int:
    """Measures what was asked for; the exit code tells whether all is as asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all if left out")
    parser.add_argument("--models", nargs="+", default=[TINY, *MODELS, NOT_TRAINED])
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--steps", type=int, default=30, help="training steps that must agree")
    parser.add_argument("--rounds", type=int, default=15, help="timed runs of every contestant")
    parser.add_argument("--markdown", type=Path, help="a file for the table")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny network, verdicts on what it computes alone"
    )
    given = parser.parse_args()
    if unknown := {*given.parts} - {*PARTS}:
        parser.error(f"there are no parts {sorted(unknown)}; there are {', '.join(PARTS)}")
    measures = dict(
        zip(PARTS, (inference, smaller, training, step_times, memory, executorch), strict=True)
    )
    sizes = Sizes(given.image_size, given.steps, given.rounds)
    models = given.models
    if given.quick:
        sizes, models = Sizes(32, 5, 2), [TINY]
    print(f"{processor()}, onnxruntime {onnxruntime.__version__}", flush=True)
    rows: list[Row] = []
    for name in models:
        for part in given.parts or PARTS:
            if applies(part, name) or (given.quick and part != "executorch"):
                found = apart(measures[part], name, sizes)
                if given.quick:  # of a tiny network neither time nor size says anything
                    found = [
                        row if " off" in row.what else replace(row, asked=None) for row in found
                    ]
                rows += found
                print(table(found), flush=True)
    print(f"\n{table(rows)}")
    if given.markdown:
        given.markdown.write_text(table(rows) + "\n", encoding="utf-8")
    good = all(row.good for row in rows)
    print("\nall as asked" if good else "\nnot all as asked")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
