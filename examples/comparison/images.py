"""Domains to learn: those that come with packages, and folders of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from comparison.backbones import Backbone
from comparison.input_errors import InputError, check_installed, listed
from comparison.sampling import at_most, split

MOST_KEPT_BYTES = 2**30  # decoded images of one part of a domain that are kept in memory


@dataclass(frozen=True)
class Domain:
    """One domain.

    Args:
        name: As in tables.
        train: Data set of (image, label), which may vary its images from time to time.
        test: Another, whose images stay.
        train_labels: (N,) labels alone.
        test_labels: The same of the test images.
        classes: Their names.
        plain: The training images as they would be if they were to test with.
    """

    name: str
    train: Dataset[Any]
    test: Dataset[Any]
    train_labels: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]
    plain: Dataset[Any]

    def limited(self, train: int | None, test: int | None) -> Domain:
        """With so many images at most, the classes in their shares."""
        return self._with(
            at_most(self.train_labels, train, 0),
            (self.test, self.test_labels, at_most(self.test_labels, test, 0)),
        )

    def validating(self, fraction: float) -> Domain:
        """A part of the training images to test with, instead of the test images."""
        first, second = split(self.train_labels, fraction, 0)
        return self._with(first, (self.plain, self.train_labels, second))

    def _with(self, trained: list[int], test: tuple[Dataset[Any], Tensor, list[int]]) -> Domain:
        data, labels, tested = test
        return Domain(
            self.name,
            Subset(self.train, trained),
            Subset(data, tested),
            self.train_labels[trained],
            labels[tested],
            self.classes,
            Subset(self.plain, trained),
        )


# --- domains that come with packages --------------------------------------------------------------


def packaged(backbone: Backbone, image_size: int, wanted: Sequence[str] = ()) -> list[Domain]:
    """Digits, textures and faces, as `datasets.py` makes them, normalised for the network.

    Raises:
        InputError: One that is wanted is none of them.
    """
    check_installed(("sklearn", "skimage", "matplotlib"), "examples")
    from datasets import DOMAINS, load_domain

    unknown = sorted({*wanted} - {*DOMAINS})
    if unknown:
        raise InputError(
            f"No domain {listed(unknown)} comes with packages: there are {listed(DOMAINS)}."
        )
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (backbone.mean, backbone.std))

    def normalised(data: TensorDataset) -> TensorDataset:
        images, labels = data.tensors
        return TensorDataset(((images + 1) / 2 - mean) / std, labels)

    found = []
    for name in wanted or DOMAINS:
        data = load_domain(name, image_size)
        train, test = normalised(data.train), normalised(data.test)
        labels = train.tensors[1], test.tensors[1]
        found.append(Domain(name, train, test, *labels, data.classes, train))
    return found


# --- folders of images ----------------------------------------------------------------------------


class Images(Dataset[tuple[Tensor, int]]):
    """Normalised images out of files, and their labels.

    Args:
        files: Images of any kind that pillow opens.
        labels: One a file.
        fit: Gives an image the network's size.
        backbone: Whose mean and spread the images get.
        keep: Decode all files now, and keep them in memory.

    Raises:
        InputError: A file is no image; at once or when it is read.
    """

    def __init__(
        self,
        files: Sequence[Path],
        labels: Sequence[int],
        fit: Callable[[Image.Image], Image.Image],
        backbone: Backbone,
        *,
        keep: bool,
    ) -> None:
        self.files, self.labels, self.fit = files, labels, fit
        self.mean, self.std = (
            255 * torch.tensor(v).view(3, 1, 1) for v in (backbone.mean, backbone.std)
        )
        self.kept = [self._read(file) for file in files] if keep else None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self._read(self.files[index]) if self.kept is None else self.kept[index]
        return (image - self.mean) / self.std, self.labels[index]

    def _read(self, file: Path) -> Tensor:
        image = np.array(self.fit(read_image(file)))
        return torch.from_numpy(image).permute(2, 0, 1)  # (3, H, W) of bytes


def read_image(path: Path) -> Image.Image:
    """An image in colour, whatever it was in."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(
            f"{path} cannot be read as an image ({type(error).__name__}): mend it or take it away."
        ) from error


def folders(
    root: Path, backbone: Backbone, image_size: int, wanted: Sequence[str] = ()
) -> list[Domain]:
    """Every domain of a folder, or those wanted: <domain>/{train,test}/<class>/<image>.

    Images are resized by their short side and cropped at their middle.

    Raises:
        InputError: The folder, a class or an image is not as it should be.
    """
    if not root.is_dir():
        raise InputError(f"--data {root}: there is no such folder.")
    found = [f for f in _folders_of(root) if (f / "train").is_dir() or (f / "test").is_dir()]
    chosen = [folder for folder in found if not wanted or folder.name in wanted]
    unknown = sorted({*wanted} - {folder.name for folder in found})
    if found and unknown:
        raise InputError(
            f"{root} has no domain {listed(unknown)}: it has {listed(f.name for f in found)}."
        )
    if not found:
        raise InputError(
            f"--data {root} holds no domain: images must lie in "
            f"{root}/<domain>/train/<class>/ and {root}/<domain>/test/<class>/."
        )
    fit = Compose(
        [Resize(image_size, InterpolationMode.BICUBIC, antialias=True), CenterCrop(image_size)]
    )
    return [read_domain(folder, "test", fit, fit, backbone, image_size) for folder in chosen]


def read_domain(
    folder: Path,
    test: str,
    fit_train: Callable[[Image.Image], Image.Image],
    fit_test: Callable[[Image.Image], Image.Image],
    backbone: Backbone,
    image_size: int,
) -> Domain:
    """One domain out of the folders "train" and `test` of a folder.

    Images that are fitted the same way every time, and few enough, are read now.
    """
    parts = {part: _classes(folder / part) for part in ("train", test)}
    _check(folder, parts["train"], test, parts[test])
    classes = tuple(parts["train"])

    def images(part: str, fit: Callable[[Image.Image], Image.Image]) -> Images:
        files = [file for name in classes for file in parts[part][name]]
        labels = [label for label, name in enumerate(classes) for _ in parts[part][name]]
        few = len(files) * 3 * image_size**2 <= MOST_KEPT_BYTES
        keep = few and (fit_train is fit_test)  # else a protocol's, large and varied
        return Images(files, labels, fit, backbone, keep=keep)

    train, tested = images("train", fit_train), images(test, fit_test)
    plain = train if fit_train is fit_test else images("train", fit_test)
    labels = (torch.tensor(part.labels) for part in (train, tested))
    return Domain(folder.name, train, tested, *labels, classes, plain)


def _folders_of(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))


def _classes(folder: Path) -> dict[str, list[Path]]:
    """The image files of every class."""
    if not folder.is_dir():
        raise InputError(
            f"{folder} is missing: put images into {folder}/<class>/, or take its domain away."
        )
    known = Image.registered_extensions()
    return {
        part.name: sorted(
            f
            for f in part.iterdir()
            if f.suffix.lower() in known and not f.name.startswith(".") and f.is_file()
        )
        for part in _folders_of(folder)
    }


def _check(
    folder: Path, train: dict[str, list[Path]], test: str, tested: dict[str, list[Path]]
) -> None:
    """Raises about the first thing that is wrong with the classes of a domain."""
    empty = [
        f"{folder}/{part}/{name}"
        for part, classes in (("train", train), (test, tested))
        for name, files in classes.items()
        if not files
    ]
    untaught, untested = sorted(set(tested) - set(train)), sorted(set(train) - set(tested))
    alone = [name for name, files in train.items() if len(files) == 1]
    if empty:
        raise InputError(
            f"No image lies in {listed(empty)}: add images of this class, or remove it from both "
            f"train and {test}."
        )
    if untaught:
        raise InputError(
            f"{folder}/{test} has classes that {folder}/train lacks ({listed(untaught)}): add "
            "training images, or remove them."
        )
    if untested:
        raise InputError(
            f"{folder}/train has classes that {folder}/{test} lacks ({listed(untested)}): add "
            "test images, or remove them."
        )
    if len(train) < 2:
        raise InputError(f"{folder} has {len(train)} class(es): at least 2 are needed.")
    if alone:
        raise InputError(
            f"{folder}/train has a single image of {listed(alone)}: at least 2 are needed, one to "
            "train and one to choose the learning rate by."
        )
