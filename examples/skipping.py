"""What skipping residual branches saves: time of inference and of a training step, and FLOPs.

For every network: its own inference, that of the converted one with a domain that computes all of
it, and with one that skips about half of the FLOPs; and a training step of both domains. All take
turns in one process; medians. Which branches are skipped is fixed, and spread evenly: what they
compute has no part in how long it takes. The weights are random for the same reason.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping

import torch
import torchvision
from comparison.backbones import LITE0, lite0
from measure import CLASSES, Step, processor, sgd, step_flops
from torch import Tensor, nn

from lightning_da3 import DA3Config, DA3Model, convert

NETWORKS = ("resnet50", "mobilenet_v2", "efficientnet_b0", LITE0, "vit_b_16", "convnext_tiny")
OPEN, SKIPPED, ORIGINAL = "open", "skipped", "original"


def spread_evenly(model: DA3Model, target: float) -> list[str]:
    """Every second branch, then every second of the others, until at most `target` is left."""
    plan, chosen = model.plan, list[str]()
    waiting = [branch.name for branch in plan.branches]
    while waiting and plan.executed_share(chosen) > target:
        for name in waiting[1::2] or waiting:
            if plan.executed_share(chosen) > target:
                chosen.append(name)
        waiting = [name for name in waiting if name not in chosen]
    return chosen


def medians(
    model: DA3Model, contestants: Mapping[str, Callable[[], object]], rounds: int
) -> dict[str, float]:
    """Milliseconds of each, with the domain of its name if there is one; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for round_ in range(rounds + 2):
        for name, run in contestants.items():
            model.set_domain(name if name in model.domains else None)
            start = time.perf_counter()
            run()
            if round_ >= 2:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(taken) for name, taken in times.items()}


def inference(model: DA3Model, network: nn.Module, images: Tensor, rounds: int) -> dict[str, float]:
    model.eval()
    with torch.inference_mode():
        runs = {OPEN: lambda: model(images), SKIPPED: lambda: model(images)}
        return medians(model, {ORIGINAL: lambda: network(images), **runs}, rounds)


def training(
    model: DA3Model, images: Tensor, rounds: int
) -> tuple[dict[str, float], dict[str, int]]:
    """Milliseconds and FLOPs of a training step."""
    model.train()
    labels, steps, flops = torch.randint(CLASSES, (len(images),)), {}, {}
    for name in (OPEN, SKIPPED):
        model.set_domain(name)
        steps[name] = Step(model, images, labels, sgd)
        flops[name] = step_flops(steps[name])
    return medians(model, steps, rounds), flops


def row(name: str, target: float, size: int, rounds: int) -> str:
    torch.manual_seed(0)
    network: nn.Module = (
        lite0(size).with_head(CLASSES)
        if name == LITE0
        else getattr(torchvision.models, name)(weights=None)
    )
    network.eval()
    images = torch.randn(4, 3, size, size).contiguous(memory_format=torch.channels_last)
    model = convert(network, DA3Config(gate=None), images[:1], verify=False)
    network.to(memory_format=torch.channels_last)
    for domain in (OPEN, SKIPPED):
        model.add_domain(domain, CLASSES)
    chosen = spread_evenly(model, target)
    model.skip(SKIPPED, chosen)
    said = f"{name:16}{len(chosen):>4}/{len(model.plan.branches):<3}"
    said += f"{model.plan.executed_share(chosen):>6.2f}"
    for batch in (1, 4):
        ms = inference(model, network, images[:batch], rounds)
        said += f"{ms[ORIGINAL]:>9.0f}{ms[OPEN]:>7.0f}{ms[SKIPPED]:>7.0f}"
        said += f"{ms[OPEN] / ms[SKIPPED]:>7.2f}x{ms[ORIGINAL] / ms[SKIPPED]:>6.2f}x"
    took, flops = training(model, images, rounds)
    said += f"{took[OPEN]:>9.0f}{took[SKIPPED]:>7.0f}{took[OPEN] / took[SKIPPED]:>6.2f}x"
    return said + f"{flops[OPEN] / 1e9:>7.1f}{flops[SKIPPED] / 1e9:>7.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", default=NETWORKS, help="of torchvision")
    parser.add_argument("--target", type=float, default=0.5, help="share of the FLOPs that is left")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(f"{processor()}, medians of {given.rounds}, ms\n")
    print(f"{'':29}{'-- inference, batch 1 ---------------':>38}", end="")
    print(f"{'-- inference, batch 4 ---------------':>38}{'-- step, batch 4 ----':>23}   - GFLOP -")
    columns = f"{'own':>9}{'open':>7}{'skips':>7}{'/open':>8}{'/own':>7}"
    print(f"{'':16}{'skips':>7}{'left':>6}{2 * columns}{'open':>9}{'skips':>7}{'':7}", end="")
    print(f"{'open':>7}{'skips':>7}")
    for name in given.networks:
        print(row(name, given.target, given.image_size, given.rounds), flush=True)


if __name__ == "__main__":
    main()
