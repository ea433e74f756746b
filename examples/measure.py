"""Memory, time and size of learning a domain, beside fine-tuning, all measured in this run.

Saved activation bytes: what autograd keeps for the backward pass. Peak: highest total of memory
that one step allocates and holds, forward, backward and optimizer, above its start. Time: median
of steps of contestants that take turns in one process, each in its faster memory format. Every
network has a process of its own. FLOPs: of the matrix products and convolutions of the same step,
forward, backward and what is computed again; they do not depend on the machine, as time does.
The weights are random: neither bytes nor FLOPs nor time depend on them.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torchvision
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_da3 import DA3Config, DA3Model, MemoryConfig, convert
from lightning_da3.memory import SavedActivations, measure_step
from lightning_da3.memory.kernels import flops

Result = TypeVar("Result")

CLASSES = 10
TURN = 3  # timed steps of one contestant before it is the next one's turn
HALVED = DA3Config(memory=MemoryConfig(weights="bfloat16"))
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

# fine-tuning / DA3, and for the parameters their largest share of the backbone
ASKED = {
    "resnet50": {"saved": 37.0, "peak": 7.0, "time": 1.6, "parameters": 0.05},
    "mobilenet_v2": {"saved": 50.0},
    "resnet18": {"saved": 30.0},
}


class Step:
    """One training step of a network on one batch, as often as it is called."""

    def __init__(
        self,
        network: nn.Module,
        images: Tensor,
        labels: Tensor,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
    ) -> None:
        self.network, self.images, self.labels = network, images, labels
        self.optimizer = optimizer(p for p in network.parameters() if p.requires_grad)

    def forward(self) -> Tensor:
        return nn.functional.cross_entropy(self.network(self.images), self.labels)

    def __call__(self) -> None:
        self.forward().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class Time(NamedTuple):
    """How long something takes: by the clock, and of all threads of the process together."""

    wall_ms: float
    cpu_ms: float


@dataclass(frozen=True)
class Cost:
    """What one training step costs; saved bytes by module of the network."""

    saved_by_module: Mapping[str, int]
    peak_bytes: int
    flops: int
    time: Time

    @property
    def saved_bytes(self) -> int:
        return sum(self.saved_by_module.values())

    @property
    def time_ms(self) -> float:
        return self.time.wall_ms


class Flops(TorchDispatchMode):
    """FLOPs of the matrix products and convolutions in a `with` block, two a multiply-add."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count += flops(func, args, kwargs or {}, result)
        return result


def step_flops(step: Callable[[], object]) -> int:
    """Of a training step: forward, backward with what it computes again, optimizer.

    A compiled network counts as it is without the compiler, whose kernels are not seen.
    """
    with torch.compiler.set_stance("force_eager"), Flops() as counted:
        step()
    return counted.count


def costs(steps: Mapping[str, Step], rounds: int) -> dict[str, Cost]:
    """Measures every step's memory and FLOPs, then the times of all, taking turns."""
    memory = {}
    for name, step in steps.items():
        peak = measure_step(step, warmup=1, repeats=0).peak_bytes
        with SavedActivations(step.network, inputs=step.images) as saved:
            loss = step.forward()
        del loss  # the graph lived until here
        memory[name] = (saved.by_module, peak, step_flops(step))
    times = alternate(steps, rounds)
    return {name: Cost(*memory[name], times[name]) for name in steps}


def alternate(steps: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Time]:
    """Median times of so many steps of each, in turns, so that what else runs hits all alike.

    In training, a step follows one of the same network. So a turn begins with a step that is not
    timed, after which caches hold what this network needs, and no longer what the one before did.
    """
    times: dict[str, list[Time]] = {name: [] for name in steps}
    for done in range(0, rounds, TURN):
        for name, step in steps.items():
            step()
            for _ in range(min(TURN, rounds - done)):
                wall, cpu = time.perf_counter(), time.process_time()
                step()
                elapsed = time.perf_counter() - wall, time.process_time() - cpu
                times[name].append(Time(1e3 * elapsed[0], 1e3 * elapsed[1]))
    return {
        name: Time(*map(statistics.median, zip(*values, strict=True)))
        for name, values in times.items()
    }


def processor() -> str:
    """The processor's name, and the threads that torch has of it."""
    name = platform.processor() or platform.machine()
    about = Path("/proc/cpuinfo")
    if about.exists():
        named = [x for x in about.read_text().splitlines() if x.startswith("model name")]
        name = named[0].partition(":")[2].strip() if named else name
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}, torch {torch.__version__}"


def resting_bytes(network: nn.Module) -> int:
    """Of parameters and buffers."""
    return sum(t.nbytes for t in (*network.parameters(), *network.buffers()))


def build(name: str, image_size: int) -> nn.Module:
    """A torchvision network for such images, with random weights."""
    sized: dict[str, Any] = {"image_size": image_size} if name.startswith("vit") else {}
    return torchvision.models.get_model(name, num_classes=CLASSES, **sized)


def with_domain(network: nn.Module, config: DA3Config | None = None) -> DA3Model:
    """The network converted, with one domain that trains."""
    model = convert(network, config)
    model.add_domain("measured", num_classes=CLASSES)
    model.set_domain("measured")
    return model.train()


def measure(name: str, batch_size: int, image_size: int, rounds: int) -> bool:
    """Prints the figures of one torchvision network; whether all that was asked is reached."""
    torch.manual_seed(0)
    images = torch.randn(batch_size, 3, image_size, image_size)
    labels = torch.randint(CLASSES, (batch_size,))
    steps = {}
    for layout, memory_format in FORMATS.items():
        network = build(name, image_size)
        network.to(memory_format=memory_format)
        x = images.contiguous(memory_format=memory_format)
        steps[f"fine-tuning {layout}"] = Step(network, x, labels, sgd)
        steps[f"DA3 {layout}"] = Step(with_domain(network), x, labels, sgd)
    measured = costs(steps, rounds)
    tuned_in, ours_in = (fastest(measured, method) for method in ("fine-tuning", "DA3"))
    tuned, ours = measured[tuned_in], measured[ours_in]
    exact = with_domain(network, DA3Config(memory=MemoryConfig(exact=True)))
    rested = with_domain(network, HALVED)
    others = {"exact": Step(exact, x, labels, sgd), "rested": Step(rested, x, labels, sgd)}
    other = costs(others, rounds=1)

    print(f"\n{name}, batch {batch_size} at {image_size}x{image_size}, {CLASSES} classes, random")
    print(f"weights; faster memory formats: {tuned_in}, {ours_in}\n")
    print(f"  {'':30}{'fine-tuning':>12}{'DA3':>12}{'ratio':>9}{'asked':>9}")
    asked = ASKED.get(name, {}) if (batch_size, image_size) == (4, 224) else {}
    good = [
        _row("saved activations, MiB", tuned.saved_bytes, ours.saved_bytes, asked.get("saved")),
        _row("peak of a step, MiB", tuned.peak_bytes, ours.peak_bytes, asked.get("peak")),
        _row("time of a step, ms", tuned.time_ms, ours.time_ms, asked.get("time"), unit=1),
        _row("FLOPs of a step, 1e9", tuned.flops, ours.flops, None, unit=1e9),
        _row("saved, exact mode, MiB", tuned.saved_bytes, other["exact"].saved_bytes, None),
        _row("peak, exact mode, MiB", tuned.peak_bytes, other["exact"].peak_bytes, None),
        _row("resting model, MiB", resting_bytes(network), resting_bytes(exact), None),
        _row("resting, bfloat16, MiB", resting_bytes(network), resting_bytes(rested), None),
        _row("peak, bfloat16, MiB", tuned.peak_bytes, other["rested"].peak_bytes, None),
        _size_rows(network, exact, asked.get("parameters")),
    ]
    return all(good)


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-4)


def fastest(measured: Mapping[str, Cost], method: str) -> str:
    """The name of a method's contestant with the least time."""
    names = [name for name in measured if name.startswith(method)]
    return min(names, key=lambda name: measured[name].time_ms)


def _row(what: str, before: float, after: float, asked: float | None, unit: float = 2**20) -> bool:
    ratio = before / after
    print(f"  {what:30}{before / unit:12.2f}{after / unit:12.2f}{ratio:8.1f}x", end="")
    print(_verdict(asked, ratio, f">={asked:g}x") if asked else "")
    return asked is None or ratio >= asked


def _size_rows(network: nn.Module, model: DA3Model, asked: float | None) -> bool:
    """One domain without its head, as a share of the backbone without its head; and its file."""
    domain = model.domain("measured")
    head = 0 if domain.head is None else _count(domain.head)
    backbone = _count(network) - head  # both heads have the same number of classes
    own = _count(domain) - head
    share = own / backbone
    print(f"  {'parameters, head apart':30}{backbone:12,}{own:12,}{share:9.2%}", end="")
    print(_verdict(asked, -share, f"<={asked:.0%}", -asked) if asked else "")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "measured.safetensors"
        model.save_domain("measured", path)
        print(f"  {'file of the domain, MiB':30}{'':12}{path.stat().st_size / 2**20:12.2f}")
    return asked is None or share <= asked


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _verdict(asked: float, got: float, text: str, least: float | None = None) -> str:
    least = asked if least is None else least
    return f"{text:>9}  {'pass' if got >= least else 'FAIL'}"


def apart(function: Callable[..., Result], *args: Any) -> Result:
    """What it returns, from a process of its own.

    What other networks leave behind, free memory in scattered places above all, slows those down
    that are measured after them.
    """
    fresh = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    with fresh:
        return fresh.submit(function, *args).result()


def main() -> int:
    """Measures every network asked for; the exit code tells whether all figures are reached."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(ASKED))
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--steps", type=int, default=15, help="timed steps of every contestant")
    given = parser.parse_args()
    sizes = given.batch_size, given.image_size, given.steps
    print(processor(), flush=True)
    good = [apart(measure, name, *sizes) for name in given.models]
    print("\nall figures reached" if all(good) else "\nnot all figures reached")
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
