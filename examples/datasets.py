"""Small real image sets that come with installed packages: no network, no files to fetch.

The source domain is printed characters, drawn with the fonts that matplotlib carries and split
into train and test by font family. Three further domains use images inside the wheels of
scikit-learn and scikit-image: handwritten digits, textures and faces. They are small: a
demonstration, not a benchmark.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
import skimage
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import TensorDataset

DOMAINS = ("digits", "textures", "faces")

# Upper and lower case that look alike once size no longer tells them apart are one class.
CHARACTERS = (
    "A a B b Cc D d E e F f G g H h Il i J j Kk L M m N n Oo Pp Q q R r Ss T t Uu Vv Ww Xx Yy Zz"
).split()
TRAIN_FONTS = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
    *("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
    *("cmr10", "cmb10", "cmti10", "cmtt10"),
)
TEST_FONTS = ("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "cmss10")

_GLYPH_SIZE = 64
_PATCH_SIZE = 24


@dataclass(frozen=True)
class DomainData:
    """One domain: (image, label) pairs, the images normalised (3, size, size) tensors."""

    train: TensorDataset
    test: TensorDataset
    classes: tuple[str, ...]


def load_domain(name: str, image_size: int = 48, seed: int = 0) -> DomainData:
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


def draw_characters(
    fonts: tuple[str, ...], count: int, image_size: int = 48, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Draws printed characters, each bent, blurred, coloured and set on noise in its own way.

    Args:
        fonts: `TRAIN_FONTS` or `TEST_FONTS`; the two share no font family.
        count: Number of images.
        image_size: Height and width of the images.
        seed: The same seed draws the same images.

    Returns:
        Normalised images (count, 3, image_size, image_size) and labels, indices into `CHARACTERS`.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    glyphs, bold_glyphs, glyph_labels = _glyphs(fonts)
    picked = torch.randint(len(glyphs), (count,), generator=generator)
    ink = torch.lerp(glyphs[picked], bold_glyphs[picked], uniform(-1, 1, 1, 1, 1).clamp(min=0))

    angle, shear = uniform(-0.3, 0.3), uniform(-0.25, 0.25)
    width, height = 1 / uniform(0.6, 1.1), 1 / uniform(0.7, 1.1)
    across = [width * angle.cos(), width * (shear - angle.sin()), uniform(-0.2, 0.2)]
    down = [height * angle.sin(), height * angle.cos(), uniform(-0.2, 0.2)]
    affine = torch.stack([*across, *down], dim=1).view(count, 2, 3)
    grid = F.affine_grid(affine, [count, 1, image_size, image_size], align_corners=False)
    ink = F.grid_sample(ink, grid, align_corners=False)

    def coloured_noise(brightness: Tensor) -> Tensor:
        surface = brightness + uniform(-0.15, 0.15, 3, 1, 1)
        for cells in (3, image_size // 6, image_size // 2):
            noise = torch.randn(count, 1, cells, cells, generator=generator)
            strength = uniform(-0.15, 0.15, 1, 1, 1).clamp(min=0)
            surface = surface + strength * _resize(noise, image_size)
        return surface

    dark, contrast = uniform(0.0, 0.5, 1, 1, 1), uniform(0.25, 0.7, 1, 1, 1)
    bright = dark + contrast
    inverted = uniform(0, 1, 1, 1, 1) < 0.5
    paper = coloured_noise(torch.where(inverted, dark, bright))
    pen = coloured_noise(torch.where(inverted, bright, dark))
    images = torch.lerp(paper, pen, ink)
    blurred = _resize(F.adaptive_avg_pool2d(images, image_size // 3), image_size)
    images = torch.lerp(images, blurred, uniform(-0.5, 1, 1, 1, 1).clamp(min=0))
    grain = torch.randn(images.shape, generator=generator)
    images = images + uniform(0, 0.1, 1, 1, 1) * grain
    return _normalise(images.clamp(0, 1)), glyph_labels[picked]


@lru_cache(maxsize=2)
def _glyphs(fonts: tuple[str, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Every character in every font, white on black; the same in bold; and the labels."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    glyphs, labels = [], []
    for name in fonts:
        font = ImageFont.truetype(str(folder / f"{name}.ttf"), 2 * _GLYPH_SIZE)
        for label, letters in enumerate(CHARACTERS):
            for letter in letters:
                glyphs.append(_glyph(letter, font))
                labels.append(label)
    plain = torch.stack(glyphs)
    return plain, F.max_pool2d(plain, 5, stride=1, padding=2), torch.tensor(labels)


def _glyph(letter: str, font: ImageFont.FreeTypeFont) -> Tensor:
    """One letter in the middle of a square, as tall (or wide) as three quarters of it."""
    left, top, right, bottom = font.getbbox(letter)
    side = round(max(right - left, bottom - top) / 0.75)
    canvas = Image.new("L", (side, side))
    corner = ((side - left - right) / 2, (side - top - bottom) / 2)
    ImageDraw.Draw(canvas).text(corner, letter, fill=255, font=font)
    canvas = canvas.resize((_GLYPH_SIZE, _GLYPH_SIZE), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(canvas)).float().div(255)[None]


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
    return _normalise(_resize(images, image_size)).expand(-1, 3, -1, -1).contiguous()


def _resize(images: Tensor, size: int) -> Tensor:
    return F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)


def _normalise(images: Tensor) -> Tensor:
    return (images - 0.5) / 0.25
