"""Small real image sets that come with installed packages: no network, no files to fetch.

Handwritten digits, textures and faces, inside the wheels of scikit-learn and scikit-image. They are
small: a demonstration, not a benchmark.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import skimage
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import TensorDataset

DOMAINS = ("digits", "textures", "faces")

IMAGE_SIZE = 64
_PATCH_SIZE = 24


@dataclass(frozen=True)
class DomainData:
    """One domain: (image, label) pairs, the images normalised (3, size, size) tensors."""

    train: TensorDataset
    test: TensorDataset
    classes: tuple[str, ...]


def load_domain(name: str, image_size: int = IMAGE_SIZE, seed: int = 0) -> DomainData:
    """Loads one of `DOMAINS`.

    Args:
        name: "digits", "textures" or "faces".
        image_size: Height and width of the images.
        seed: Picks the split into train and test; textures are always split by image region.
    """
    if name == "digits":
        parts, classes = _load_digits(seed), tuple("0123456789")
    elif name == "textures":
        parts, classes = _load_textures(seed), ("brick", "grass", "gravel")
    elif name == "faces":
        parts, classes = _load_faces(seed), ("face", "other")
    else:
        raise ValueError(f"unknown domain {name!r}; choose one of {', '.join(DOMAINS)}")
    train_images, train_labels, test_images, test_labels = parts
    return DomainData(
        train=TensorDataset(_to_network_input(train_images, image_size), train_labels),
        test=TensorDataset(_to_network_input(test_images, image_size), test_labels),
        classes=classes,
    )


def _load_digits(seed: int) -> tuple[Tensor, ...]:
    digits = load_digits()
    return _split(digits.images[:, None] / 16, digits.target, seed)


def _load_faces(seed: int) -> tuple[Tensor, ...]:
    images = np.load(_skimage_file("lfw_subset.npy"))[:, None]
    labels = np.repeat([0, 1], 100)  # 100 faces, then 100 others
    train_images, train_labels, *test = _split(images, labels, seed)
    mirrored = torch.cat([train_images, train_images.flip(-1)])
    return mirrored, train_labels.repeat(2), *test


def _load_textures(seed: int) -> tuple[Tensor, ...]:
    """Patches that never overlap; the left part of each image to train, the right part to test."""
    left, right = [], []
    for name in ("brick", "grass", "gravel"):
        image = np.array(Image.open(_skimage_file(f"{name}.png")).convert("L"))
        middle = image.shape[1] // 2
        left.append(_patches(image[:, : middle - _PATCH_SIZE // 2]))
        right.append(_patches(image[:, middle + _PATCH_SIZE // 2 :]))
    order = torch.randperm(sum(map(len, left)), generator=torch.Generator().manual_seed(seed))
    train_labels = torch.arange(3).repeat_interleave(len(left[0]))
    test_labels = torch.arange(3).repeat_interleave(len(right[0]))
    return torch.cat(left)[order], train_labels[order], torch.cat(right), test_labels


def _patches(region: np.ndarray) -> Tensor:
    """Cuts a region into squares, alike in mean and contrast so that only texture tells."""
    squares = torch.from_numpy(region).float()
    squares = squares.unfold(0, _PATCH_SIZE, _PATCH_SIZE).unfold(1, _PATCH_SIZE, _PATCH_SIZE)
    squares = squares.reshape(-1, 1, _PATCH_SIZE, _PATCH_SIZE)
    spread, mean = torch.std_mean(squares, dim=(1, 2, 3), keepdim=True)
    return (0.5 + 0.2 * (squares - mean) / spread).clamp(0, 1)


def _skimage_file(name: str) -> Path:
    """A file inside the wheel (scikit-image's own loaders may try to fetch it)."""
    return Path(skimage.__file__).parent / "data" / name


def _split(images: np.ndarray, labels: np.ndarray, seed: int) -> tuple[Tensor, ...]:
    """Half to train, half to test, the classes in equal shares."""
    halves = train_test_split(images, labels, test_size=0.5, stratify=labels, random_state=seed)
    train_images, test_images, train_labels, test_labels = map(torch.from_numpy, halves)
    return train_images.float(), train_labels.long(), test_images.float(), test_labels.long()


def _to_network_input(images: Tensor, image_size: int) -> Tensor:
    """As EfficientNet-Lite0 expects images: from -1 to 1."""
    size = (image_size, image_size)
    images = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
    return (2 * images - 1).expand(-1, 3, -1, -1).contiguous()
