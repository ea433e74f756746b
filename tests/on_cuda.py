"""What a CUDA device must do as a CPU does, in less than three minutes: `python tests/on_cuda.py`.

Every network of the zoos and one of every family takes a training step on both devices: outputs
and gradients must agree, and what is kept must be as much. Then bfloat16, and a budget. Run by hand
where there is a device; ``--device cpu`` tries the script itself.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
import torchvision
from helpers import models, zoo
from helpers.comparing import leaves, score
from helpers.converted import converted
from torch.utils._pytree import tree_map_only

from lightning_da3 import DA3Config, GateConfig, MemoryConfig, convert
from lightning_da3.memory import measure_step, saved_activation_bytes

EXACT = MemoryConfig(exact=True)


def moved(value, device):
    return tree_map_only(torch.Tensor, lambda t: t.to(device), value)


def step(model, inputs):
    outputs = model(*inputs)
    trained = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(score(moved(outputs, "cpu")), trained, allow_unused=True)
    return [leaf.cpu() for leaf in leaves(outputs)], [g.cpu() for g in found if g is not None]


def close(ours, theirs, tolerance):
    for one, other in zip(ours, theirs, strict=True):
        error = (one.double() - other.double()).norm() / other.double().norm().clamp_min(1e-6)
        assert error < tolerance, f"off by {error:.1e}"


def same_on_both(model, inputs, device, tolerance=1e-3):
    there, there_inputs = copy.deepcopy(model).to(device), moved(inputs, device)
    kept = saved_activation_bytes(model, *inputs)
    kept_there = saved_activation_bytes(there, *there_inputs)
    assert abs(kept - kept_there) <= 0.05 * kept, f"keeps {kept_there}, on a CPU {kept}"
    (ours, gradients), (theirs, their_gradients) = step(there, there_inputs), step(model, inputs)
    close(ours, theirs, tolerance)
    close(gradients, their_gradients, tolerance)


def learns(network, images, device, dtype=None):
    model = convert(network, DA3Config(gate=GateConfig(target=0.5, by="cell")))
    model.add_domain("a", 5)
    model.set_domain("a")
    model = model.to(device).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
    x, y = images.to(device), torch.arange(len(images), device=device) % 5
    losses = []
    for _ in range(8):
        with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses
    return model


def budget(device):
    images = torch.randn(16, 3, 96, 96)
    model = learns(torchvision.models.resnet18(weights=None), images, device)
    x = images.to(device)

    def train():
        model(x).square().mean().backward()
        model.zero_grad()

    whole = measure_step(train, repeats=0, device=device).peak_bytes
    model.budget_policy.hold(MemoryConfig(budget=whole * 3 // 4))
    held = measure_step(train, repeats=0, device=device).peak_bytes
    assert held <= whole * 3 // 4, f"{held} of {whole * 3 // 4}"


def checks(device) -> Iterator[tuple[str, Callable[[], object]]]:
    for name in [*models.ZOO, *models.FAMILIES]:
        for config in ({}, {"memory": EXACT}):
            model = converted(name, gate=None, **config)
            yield name, lambda m=model, n=name: same_on_both(m, models.inputs(n), device)
    for name in zoo.ZOO:
        config = DA3Config(head=None, gate=None, memory=EXACT)
        model = convert(zoo.network(name), config)
        yield name, lambda m=model, n=name: same_on_both(m.train(), zoo.batch(n), device)
    images = torch.randn(10, 3, 64, 64)
    for name in ("resnet18", "mobilenet_v3_small", "efficientnet_b0", "convnext_tiny", "swin_t"):
        for dtype in (None, torch.bfloat16):
            make = torchvision.models.get_model_builder(name)
            kind = f"{name} learns, {dtype or 'float32'}"
            yield kind, lambda f=make, d=dtype: learns(f(weights=None), images, device, d)
    yield "a budget is held", lambda: budget(device)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args().device)
    wrong, start = [], time.perf_counter()
    for name, check in checks(device):
        torch.manual_seed(0)
        try:
            check()
        except Exception as error:  # noqa: BLE001  # the next ones tell more
            wrong.append(name)
            sys.stdout.write(f"WRONG {name}: {type(error).__name__}: {str(error)[:200]}\n")
    seconds = time.perf_counter() - start
    sys.stdout.write(f"{len(wrong)} wrong on {device}, {seconds:.0f} s\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
