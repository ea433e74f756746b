"""How fast a domain is learned, used and switched to, beside the usual ways to do so.

Training: a step of every contestant, forward, backward and SGD. All take turns of a few steps in
one process, a fresh one for every network and batch, each in its faster memory format, which the
run finds out first; medians, by the clock and of all threads together. Saved activations, the peak
and the FLOPs of the same steps stand in the same rows: whoever is fast is seen to be small at once,
and by how much the machine has its part in it. But for fine-tuning, networks are held in eval.
Inference: the original network beside the converted one with an active domain.
Switching: among a hundred domains, and what one more of them adds to memory.
The weights are random: neither bytes nor time depend on them.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from comparison.methods.checkpointing import checkpoint_blocks
from comparison.methods.plain import biases_only, linear_probe
from measure import (
    CLASSES,
    FORMATS,
    Cost,
    Step,
    alternate,
    apart,
    build,
    costs,
    processor,
    sgd,
    step_flops,
    with_domain,
)
from torch import Tensor, nn

from lightning_da3 import DA3Config, DA3Model, MemoryConfig

FORMAT_ROUNDS = 9  # timed steps to choose a memory format by
DOMAINS, SWITCHES, SWITCH_MS = 100, 300, 1.0


@dataclass(frozen=True)
class Asked:
    """Of DA3's steps: how many times faster than fine-tuning; and no slower than biases only."""

    ratio: float
    no_slower_than_biases: bool


ASKED = {
    "resnet50": Asked(2.0, True),
    "mobilenet_v2": Asked(2.0, True),
    "efficientnet_b0": Asked(2.0, True),
    "convnext_tiny": Asked(1.3, False),
    "vit_b_16": Asked(1.3, False),
}


# --- the contestants ------------------------------------------------------------------------------


def checkpointed(network: nn.Module) -> nn.Module:
    """Biases only, with checkpoints around the blocks that stand in rows in the network."""
    return checkpoint_blocks(biases_only(network))


def da3_exact(network: nn.Module) -> nn.Module:
    return with_domain(network, DA3Config(memory=MemoryConfig(exact=True)))


def compiled(contestant: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    def build_compiled(network: nn.Module) -> nn.Module:
        model = contestant(network)
        model.compile(dynamic=False)  # other batches are other programs, as fast as alone
        return model

    return build_compiled


TUNED, BIASES, DA3 = "fine-tuning", "bias-only", "DA3"
COMPILED = ("bias-only, compiled", "DA3 compiled")
CONTESTANTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    TUNED: nn.Module.train,
    BIASES: biases_only,
    "linear probe": linear_probe,
    "checkpointing": checkpointed,
    COMPILED[0]: compiled(biases_only),
    DA3: with_domain,
    "DA3 exact": da3_exact,
    COMPILED[1]: compiled(with_domain),
}


# --- training -------------------------------------------------------------------------------------


def training(
    name: str, batch_size: int, image_size: int, rounds: int, contestants: Sequence[str]
) -> bool:
    """Prints the steps of one network; whether DA3's, if asked about, are as fast as asked."""
    torch.manual_seed(0)
    images = torch.randn(batch_size, 3, image_size, image_size)
    labels = torch.randint(CLASSES, (batch_size,))
    if {*COMPILED} & {*contestants}:
        torch.compiler.reset()  # what another batch or network compiled is no longer needed
    steps, layouts = {}, {}
    for method in dict.fromkeys([TUNED, BIASES, *contestants]):
        layouts[method], steps[method] = faster_step(name, method, images, labels)
    measured = costs(steps, rounds)
    print(f"\n{name}, batch {batch_size} at {image_size}x{image_size}, medians of {rounds} steps\n")
    print(f"  {'':21}{'saved MiB':>10}{'peak MiB':>10}{'GFLOP':>8}{'wall ms':>9}", end="")
    print(f"{'cpu ms':>9}{'wall':>8}{'cpu':>8}{'FLOPs':>7}  memory format")
    for method, cost in measured.items():
        print(f"{_row(method, cost, measured[TUNED])}  {layouts[method]}", flush=True)
    return _verdict(measured, ASKED.get(name) if image_size == 224 else None)


def faster_step(name: str, method: str, images: Tensor, labels: Tensor) -> tuple[str, Step]:
    """A contestant's step in its faster memory format, and that format's name."""
    steps = {}
    for layout, memory_format in FORMATS.items():
        network = CONTESTANTS[method](build(name, images.shape[-1]))
        network.to(memory_format=memory_format)
        x = images.contiguous(memory_format=memory_format)
        steps[layout] = Step(network, x, labels, sgd)
        steps[layout]()
    times = alternate(steps, FORMAT_ROUNDS)
    fastest = min(times, key=lambda layout: times[layout].wall_ms)
    return fastest, steps[fastest]


def _row(method: str, cost: Cost, tuned: Cost) -> str:
    wall, cpu = (a / b for a, b in zip(tuned.time, cost.time, strict=True))
    return (
        f"  {method:21}{cost.saved_bytes / 2**20:10.2f}{cost.peak_bytes / 2**20:10.1f}"
        f"{cost.flops / 1e9:8.2f}{cost.time.wall_ms:9.1f}{cost.time.cpu_ms:9.1f}"
        f"{wall:7.2f}x{cpu:7.2f}x{cost.flops / tuned.flops:7.2f}"
    )


def _verdict(measured: dict[str, Cost], asked: Asked | None) -> bool:
    if asked is None or DA3 not in measured:
        return True
    tuned, biases, ours = (measured[method].time_ms for method in (TUNED, BIASES, DA3))
    good = _check(f"{DA3}: >= {asked.ratio}x of {TUNED}", tuned / ours, asked.ratio)
    if asked.no_slower_than_biases:
        good &= _check(f"{DA3}: no slower than {BIASES}", biases / ours, 1.0)
    return good


def _check(what: str, ratio: float, asked: float) -> bool:
    print(f"  {what:50} {ratio:6.2f}x  {'pass' if ratio >= asked else 'FAIL'}", flush=True)
    return ratio >= asked


# --- inference ------------------------------------------------------------------------------------


def inference(name: str, batch_size: int, image_size: int, rounds: int) -> bool:
    """Prints how long one pass takes; whether that is no longer than the original's."""
    runs: dict[str, Callable[[], object]] = {}
    for layout, memory_format in FORMATS.items():
        torch.manual_seed(0)
        x = torch.randn(batch_size, 3, image_size, image_size)
        x = x.contiguous(memory_format=memory_format)
        network = build(name, image_size).eval()
        model = with_domain(network).eval().to(memory_format=memory_format)
        network.to(memory_format=memory_format)
        runs[f"original {layout}"] = lambda network=network, x=x: network(x)
        runs[f"{DA3} {layout}"] = lambda model=model, x=x: model(x)
    with torch.no_grad():
        counts = {run: step_flops(use) for run, use in runs.items()}
    with torch.inference_mode():
        alternate(runs, rounds=1)
        times = alternate(runs, rounds)
    original, ours = (
        min((run for run in times if run.startswith(method)), key=lambda run: times[run].wall_ms)
        for method in ("original", DA3)
    )
    print(f"\n{name}, inference of {batch_size} at {image_size}x{image_size}, one domain active\n")
    for run in (original, ours):
        print(
            f"  {run:30}{times[run].wall_ms:9.1f} ms, cpu {times[run].cpu_ms:9.1f} ms, "
            f"{counts[run] / 1e9:.2f} GFLOP"
        )
    return _check("no slower than the original", times[original].wall_ms / times[ours].wall_ms, 1.0)


# --- switching ------------------------------------------------------------------------------------


def tracked_bytes() -> int:
    """Of the storages of all plain tensors that are alive."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter)]
    plain = [t.untyped_storage() for t in tensors if t.layout == torch.strided]
    storages = {storage._cdata: storage.nbytes() for storage in plain}
    return sum(storages.values())


def switching(name: str, image_size: int, domains: int = DOMAINS) -> bool:
    """Prints the time of a switch and a domain's share of memory; whether both are as asked."""
    model = with_domain(build(name, image_size))
    own = sum(p.nbytes for p in model.domain("measured").parameters())
    before = tracked_bytes()
    for i in range(1, domains):
        model.add_domain(f"domain{i}", num_classes=CLASSES)
    growth = (tracked_bytes() - before) / (domains - 1)
    switch_ms = statistics.median(_switch_times_ms(model))
    print(f"\n{name} with {domains} domains\n")
    print(f"  a domain's parameters {own:,} bytes; each adds {growth:,.0f} bytes to memory")
    print(f"  a switch takes {switch_ms:.3f} ms, asked: < {SWITCH_MS:g}")
    good = switch_ms < SWITCH_MS and growth == own
    print(f"  {'pass' if good else 'FAIL'}", flush=True)
    return good


def _switch_times_ms(model: DA3Model) -> list[float]:
    names, times = model.domains, []
    for i in range(SWITCHES):
        start = time.perf_counter()
        model.set_domain(names[i % len(names)])
        times.append(1e3 * (time.perf_counter() - start))
    return times


# --- the command ----------------------------------------------------------------------------------


def main() -> int:
    """Measures all that was asked for; the exit code tells whether it is as fast as asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parts = ("training", "inference", "switching")
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(parts)}; all if left out")
    parser.add_argument("--models", nargs="+", default=list(ASKED))
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--steps", type=int, default=15, help="timed steps of every contestant")
    parser.add_argument("--contestants", nargs="+", default=list(CONTESTANTS), choices=CONTESTANTS)
    given = parser.parse_args()
    if unknown := {*given.parts} - {*parts}:
        parser.error(f"there are no parts {sorted(unknown)}; there are {', '.join(parts)}")
    parts, size, steps = given.parts or parts, given.image_size, given.steps
    print(f"{processor()}, {CLASSES} classes, random weights", flush=True)
    good = [True]
    for name, batch in itertools.product(given.models, given.batch_sizes):
        if "training" in parts:
            good.append(apart(training, name, batch, size, steps, given.contestants))
        if "inference" in parts:
            good.append(apart(inference, name, batch, size, steps))
    if "switching" in parts:
        good.append(apart(switching, given.models[0], size))
    print("\nall as fast as asked" if all(good) else "\nnot all as fast as asked")
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
