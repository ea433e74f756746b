"""One batch of several domains: one pass for all, and domains that are found, not told.

An EfficientNet-Lite0 with ImageNet weights learns digits, textures and faces. Then batches of test
images of all three are classified in one pass, beside one pass for every domain and one for every
image, with the domains known and with those that the backbone's features are nearest to.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import lightning as L
import torch
from comparison.backbones import lite0
from datasets import DOMAINS, IMAGE_SIZE, DomainData, load_domain
from learning import Classifier, fit, silence_lightning
from measure import alternate, processor, step_flops
from torch import Tensor

from lightning_da3 import DA3Callback, DA3Model

LEARNING_RATE = 1e-2
BATCH_SIZES = (3, 12, 48)


def learn(data: dict[str, DomainData], epochs: int) -> DA3Model:
    """One domain after the other, and what its training images look like to the backbone."""
    module = Classifier(lite0(IMAGE_SIZE).make(), LEARNING_RATE)
    for domain in DOMAINS:
        L.seed_everything(0, verbose=False)
        callback = DA3Callback(domain, num_classes=len(data[domain].classes))
        fit(module, data[domain], epochs, most_batches=None, loggers=[], callbacks=[callback])
        module.network.fit_statistics(domain, data[domain].train.tensors[0].split(256))
    return module.network.eval()


def shuffled_test(data: dict[str, DomainData], each: int) -> tuple[Tensor, Tensor, list[str]]:
    """As many test images of every domain, with labels and domains, in random order."""
    order = torch.Generator().manual_seed(0)
    images, labels, domains = [], [], []
    for domain in DOMAINS:
        test_images, test_labels = data[domain].test.tensors
        picked = torch.randperm(len(test_labels), generator=order)[:each]
        images.append(test_images[picked])
        labels.append(test_labels[picked])
        domains += [domain] * len(picked)
    mixed = torch.randperm(len(domains), generator=order)
    return torch.cat(images)[mixed], torch.cat(labels)[mixed], [domains[i] for i in mixed.tolist()]


def one_by_one(model: DA3Model, images: Tensor, domains: Sequence[str]) -> list[Tensor]:
    """A pass for every image."""
    scores = []
    for image, domain in zip(images, domains, strict=True):
        model.set_domain(domain)
        scores.append(model(image[None])[0])
    return scores


def by_domain(model: DA3Model, images: Tensor, domains: Sequence[str]) -> list[Tensor]:
    """A pass for every domain, and everything back into its place."""
    scores: list[Tensor] = [images] * len(images)
    for domain in dict.fromkeys(domains):
        own = [i for i, name in enumerate(domains) if name == domain]
        model.set_domain(domain)
        for i, its in zip(own, model(images[own]), strict=True):
            scores[i] = its
    return scores


@torch.no_grad()
def compare_times(model: DA3Model, images: Tensor, domains: list[str], rounds: int) -> None:
    print(f"\n{processor()}")
    print(f"{'ms a batch (in brackets: / one pass)':40}" + "".join(f"{n:>16}" for n in BATCH_SIZES))
    found, counts, largest = [], [], 0.0
    for count in BATCH_SIZES:
        x, names = images[:count], domains[:count]
        ways = {
            "one pass for all": lambda x=x, names=names: model(x, domains=names),
            "one pass a domain": lambda x=x, names=names: by_domain(model, x, names),
            "one pass an image": lambda x=x, names=names: one_by_one(model, x, names),
        }
        mixed, *others = (way() for way in ways.values())
        for other in others:
            errors = [(a - b).abs().max() for a, b in zip(mixed, other, strict=True)]
            largest = max(largest, float(max(errors)))
        counts.append({name: step_flops(way) for name, way in ways.items()})
        found.append(alternate(ways, rounds))
    for way in found[0]:
        times = [(t[way].wall_ms, t["one pass for all"].wall_ms) for t in found]
        cells = [f"{ms:.1f} ({ms / least:.2f}x)" for ms, least in times]
        print(f"  {way:38}" + "".join(f"{cell:>16}" for cell in cells))
        print(f"  {'  GFLOP':38}" + "".join(f"{count[way] / 1e9:16.2f}" for count in counts))
    print(f"  largest difference of scores {largest:.1g}")


@torch.no_grad()
def compare_accuracies(model: DA3Model, data: dict[str, DomainData]) -> None:
    images, labels, domains = shuffled_test(data, each=10**6)
    chosen = [name for part in images.split(256) for name in model.nearest_domains(part)]
    right = {
        "the right domain is the nearest": [a == b for a, b in zip(chosen, domains, strict=True)],
        "right classes, domains known": _right(model, images, labels, domains, domains),
        "right classes, nearest domains": _right(model, images, labels, domains, chosen),
    }
    print(f"\n{'% of test images':40}" + "".join(f"{name:>16}" for name in (*DOMAINS, "mean")))
    for what, hits in right.items():
        shares = []
        for domain in DOMAINS:
            own = [hit for hit, name in zip(hits, domains, strict=True) if name == domain]
            shares.append(100 * sum(own) / len(own))
        cells = (*shares, sum(shares) / len(shares))
        print(f"  {what:38}" + "".join(f"{cell:16.1f}" for cell in cells))


def _right(
    model: DA3Model, images: Tensor, labels: Tensor, domains: list[str], assumed: list[str]
) -> list[bool]:
    """Whether each image gets its domain and class, if it is taken to be of the assumed domain."""
    size = 256
    classes = [
        int(scores.argmax())
        for start in range(0, len(images), size)
        for scores in model(images[start : start + size], domains=assumed[start : start + size])
    ]
    said = zip(assumed, classes, strict=True)
    return list(map(tuple.__eq__, said, zip(domains, labels.tolist(), strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=15, help="of training, for every domain")
    parser.add_argument("--quick", action="store_true", help="2 epochs, few rounds")
    arguments = parser.parse_args()
    silence_lightning()
    data = {domain: load_domain(domain) for domain in DOMAINS}
    model = learn(data, 2 if arguments.quick else arguments.epochs)
    images, _, domains = shuffled_test(data, each=max(BATCH_SIZES))
    compare_times(model, images, domains, rounds=5 if arguments.quick else 30)
    compare_accuracies(model, data)
    statistics = sum(b.nbytes for b in model.domain(DOMAINS[0]).statistics.buffers())
    print(f"\nstatistics: {statistics:,} bytes a domain")


if __name__ == "__main__":
    main()
