"""Domains learned in a process where `import torch` fails, beside the same in PyTorch.

An EfficientNet-Lite0 with ImageNet weights is exported once: a training step and an inference,
which both take any domain. A process with ONNX Runtime and numpy alone learns digits, textures and
faces with them and saves domain files. They are loaded here and compared bit for bit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from comparison.backbones import lite0
from comparison.input_errors import InputError
from datasets import DOMAINS, IMAGE_SIZE, DomainData, load_domain
from device_side import rate_at
from torch import Tensor, nn

from lightning_da3 import DA3Model, convert
from lightning_da3.files.domain_file import read_domain

CLASSES = 10  # of every domain: one file serves all with as many
RECIPE = {"batch_size": 32, "learning_rate": 1e-3}
START = time.perf_counter()


def say(text: str) -> None:
    print(f"[{time.perf_counter() - START:4.0f} s] {text}", flush=True)


def small_network() -> nn.Module:
    """What stands in for the pretrained network where there is little time."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inner, outer in ((3, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(inner, outer, 3, 2, 1), nn.BatchNorm2d(outer), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)).eval()


def prepare(folder: Path, model: DA3Model, data: dict[str, DomainData], recipe: Any) -> None:
    """Everything that goes to the device."""
    for domain, own in data.items():
        (x, y), (test_x, test_y) = own.train.tensors, own.test.tensors
        arrays = {
            "train_images": x,
            "train_labels": y,
            "test_images": test_x,
            "test_labels": test_y,
        }
        np.savez(folder / domain, **{name: array.numpy() for name, array in arrays.items()})
        model.add_domain(domain, num_classes=CLASSES)
        model.save_domain(domain, folder / f"{domain}.start.safetensors")
    first, examples = next(iter(data)), x[:2]
    say("a training step and an inference are written as ONNX files")
    model.export_training(first, folder / "step.onnx", examples, optimizer="adam")
    model.export(first, folder / "inference.onnx", examples, domains="inputs")
    (folder / "recipe.json").write_text(json.dumps({**recipe, "domains": list(data)}))


def learn_here(
    model: DA3Model, file: Path, name: str, data: DomainData, seed: int, recipe: Any
) -> float:
    """The same in PyTorch; the accuracy."""
    images, labels = data.train.tensors
    domain = model.load_domain(file, name)
    model.set_domain(domain)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, size = torch.optim.Adam(trained), recipe["batch_size"]
    torch.manual_seed(seed)
    starts = range(0, len(images), size)
    for epoch in range(recipe["epochs"]):
        order = torch.randperm(len(images))
        for i, start in enumerate(starts):
            progress = (epoch + i / len(starts)) / recipe["epochs"]
            model.train()
            optimizer.param_groups[0]["lr"] = rate_at(progress, recipe["learning_rate"])
            chosen = order[start : start + size]
            F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return accuracy(scores_of(model, domain, data.test.tensors[0]), data)


@torch.no_grad()
def scores_of(model: DA3Model, domain: str, images: Tensor) -> Tensor:
    model.eval().set_domain(domain)
    return torch.cat([model(part) for part in images.split(32)])


def accuracy(scores: Tensor, data: DomainData) -> float:
    return float((scores.argmax(1) == data.test.tensors[1]).float().mean())


def same_bits(model: DA3Model, name: str, path: Path) -> bool:
    """Whether a domain that was loaded has every bit of its file."""
    file, own = read_domain(path).tensors, model.domain(name).state_dict()
    return file.keys() == own.keys() and all(torch.equal(own[key], file[key]) for key in file)


def demonstrate(folder: Path, network: nn.Module, domains: list[str], recipe: Any) -> list[Any]:
    """A row for every domain."""
    data = {domain: load_domain(domain) for domain in domains}
    torch.manual_seed(0)
    model = convert(network)
    prepare(folder, model, data, recipe)
    say("a process without PyTorch learns")
    script = Path(__file__).with_name("device_side.py")
    subprocess.run([sys.executable, str(script), str(folder)], check=True)
    learned = json.loads((folder / "learned.json").read_text())
    rows = []
    for domain, own in data.items():
        say(f"PyTorch learns {domain}")
        start, device = folder / f"{domain}.start.safetensors", learned[domain]
        here, loaded, off, same = [], [], 0.0, True
        for seed in range(recipe["seeds"]):
            here.append(learn_here(model, start, f"{domain}-here-{seed}", own, seed, recipe))
            path = folder / f"{domain}.{seed}.safetensors"
            name = model.load_domain(path, f"{domain}-there-{seed}")
            scores = scores_of(model, name, own.test.tensors[0])
            theirs = torch.from_numpy(np.load(folder / f"{domain}.{seed}.npy"))
            off = max(off, float((scores - theirs).abs().max() / theirs.abs().max()))
            loaded.append(accuracy(scores, own))
            same = same and same_bits(model, name, path)
        there, ms = [run["accuracy"] for run in device], min(run["ms"] for run in device)
        rows.append((domain, here, there, loaded, off, same, ms))
    return rows


def show(rows: list[Any]) -> None:
    print(
        "\n| domain | PyTorch | device | its file, in PyTorch | scores off by | bits | ms a step |"
    )
    print("|---|---|---|---|---|---|---|")
    for domain, *accuracies, off, same, ms in rows:
        shown = " | ".join(of_seeds(values) for values in accuracies)
        bits = "the same" if same else "DIFFERENT"
        print(f"| {domain} | {shown} | {off:.1e} | {bits} | {ms:.0f} |")


def of_seeds(values: list[float]) -> str:
    """The mean, and of several from where to where."""
    mean = f"{sum(values) / len(values):.1%}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1%} to {max(values):.1%})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--domains", nargs="+", choices=DOMAINS, default=list(DOMAINS))
    parser.add_argument("--seeds", type=int, default=1, help="repeat, and print means and ranges")
    parser.add_argument("--output", type=Path, help="where all files stay; by default none does")
    parser.add_argument("--quick", action="store_true", help="one domain, of a small network")
    given = parser.parse_args()
    recipe = {**RECIPE, "epochs": given.epochs, "seeds": given.seeds}
    try:
        network = small_network() if given.quick else lite0(IMAGE_SIZE).make().eval()
    except InputError as error:
        raise SystemExit(f"learn_without_torch.py: {error}") from None
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.output or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        domains = ["faces"] if given.quick else given.domains
        show(demonstrate(folder, network, domains, recipe))


if __name__ == "__main__":
    main()
