"""Protocols of the literature, for whoever has their images: where they lie, how they are cut.

ImageNet-to-Sketch as in Piggyback (Mallya et al. 2018), Visual Decathlon as in its first edition
(Rebuffi et al. 2017), whose test labels are not public: its validation part is tested on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torchvision.transforms import (
    CenterCrop,
    Compose,
    RandomCrop,
    RandomHorizontalFlip,
    RandomResizedCrop,
    Resize,
)

from comparison.backbones import Backbone
from comparison.images import Domain, read_domain
from comparison.input_errors import InputError


@dataclass(frozen=True)
class Cut:
    """How the images of a domain get the network's size, to train and to test."""

    train: Compose
    test: Compose


@dataclass(frozen=True)
class Protocol:
    """Args:
    image_size: Height and width of the images.
    test: Folder of the images to test with.
    cuts: Of every domain, by the name of its folder.
    """

    image_size: int
    test: str
    cuts: dict[str, Cut]


def _whole(size: int) -> Cut:
    """Images that were cropped by their boxes: resized whole."""
    resize = Resize((size, size))
    return Cut(Compose([resize, RandomHorizontalFlip()]), Compose([resize]))


def _part(size: int, resized: int) -> Cut:
    train = Compose([Resize(resized), RandomResizedCrop(size), RandomHorizontalFlip()])
    return Cut(train, Compose([Resize(resized), CenterCrop(size)]))


def _crop(size: int, resized: int, *, flip: bool) -> Cut:
    train = [Resize(resized), CenterCrop(resized), RandomCrop(size)]
    return Cut(
        Compose([*train, RandomHorizontalFlip()] if flip else train),
        Compose([Resize(resized), CenterCrop(size)]),
    )


SKETCH = {
    "cubs_cropped": _whole(224),
    "stanford_cars_cropped": _whole(224),
    "flowers": _part(224, 256),
    "wikiart": _part(224, 256),
    "sketches": _part(224, 256),
}
MIRRORED = "aircraft cifar100 daimlerpedcls dtd imagenet12 ucf101 vgg-flowers".split()
WRITTEN = "gtsrb omniglot svhn".split()  # signs and characters, which change when mirrored
DECATHLON = {name: _crop(64, 72, flip=name in MIRRORED) for name in sorted(MIRRORED + WRITTEN)}

PROTOCOLS = {
    "imagenet-to-sketch": Protocol(224, "test", SKETCH),
    "visual-decathlon": Protocol(64, "val", DECATHLON),
}


def load_protocol(
    name: str, root: Path, backbone: Backbone, wanted: Sequence[str] = ()
) -> list[Domain]:
    """The domains of a protocol, all or those wanted, out of root/<domain>/{train,<test>}/<class>.

    Raises:
        InputError: A domain is missing, or is none of the protocol.
    """
    protocol = PROTOCOLS[name]
    names = wanted or list(protocol.cuts)
    unknown = [n for n in names if n not in protocol.cuts]
    if unknown:
        raise InputError(
            f"{name} has no domain {', '.join(unknown)}: it has {', '.join(protocol.cuts)}."
        )
    missing = [
        str(root / n / part)
        for n in names
        for part in ("train", protocol.test)
        if not (root / n / part).is_dir()
    ]
    if missing:
        raise InputError(
            f"{name} needs images that are not there: put them into <class> folders of "
            f"{', '.join(missing)}, or name the domains that you have with --domains."
        )
    cuts = {n: protocol.cuts[n] for n in names}
    return [
        read_domain(root / n, protocol.test, c.train, c.test, backbone, protocol.image_size)
        for n, c in cuts.items()
    ]
