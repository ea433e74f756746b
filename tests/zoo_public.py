"""Public networks, converted: a table of what each reaches. Run it as a script.

    python tests/zoo_public.py [--small] [names ..]

It needs transformers, segmentation_models_pytorch, monai, open_clip, pytorchvideo or timm; what is
not installed is left out. Weights are random, and nothing is downloaded.
"""

# ruff: noqa: PERF203, T201

from __future__ import annotations

import argparse
import importlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_da3 import DA3Model, convert
from lightning_da3.memory import measure_step, saved_activation_bytes

CLASSES = 5


@dataclass(frozen=True)
class Entry:
    """One network.

    Attributes:
        library: The package that it comes from.
        build: Makes it; its argument says whether it is to be small.
        shape: Of a batch of its own size.
        small: Of a batch for the small one.
        ids: The batch is of integers.
    """

    library: str
    build: Callable[[Any, bool], nn.Module]
    shape: tuple[int, ...]
    small: tuple[int, ...]
    ids: bool = False

    def batch(self, small: bool) -> Tensor:
        shape = self.small if small else self.shape
        return torch.randint(50, shape) if self.ids else torch.randn(shape)


TOKENS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
MLP = {**TOKENS, "intermediate_size": 64}
IMAGE = {**MLP, "image_size": 32, "patch_size": 8}
PICTURES, TINY, SMALL = (2, 3, 224, 224), (2, 3, 32, 32), (2, 3, 64, 64)
WAVE = {
    **MLP,
    "conv_dim": (16, 16, 16),
    "conv_stride": (5, 2, 2),
    "conv_kernel": (10, 3, 3),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 16,
}
MELS = {**MLP, "num_mel_bins": 32, "max_length": 64}
SEGMENTS = {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "decoder_hidden_size": 16}


def transformer(
    kind: str,
    config: str,
    sizes: dict[str, Any],
    shape: tuple[int, ...] = PICTURES,
    small: tuple[int, ...] = TINY,
    ids: bool = False,
) -> Entry:
    def build(library: Any, is_small: bool) -> nn.Module:
        chosen = getattr(library, config)(num_labels=CLASSES, **(sizes if is_small else {}))
        return getattr(library, kind)(chosen)

    return Entry("transformers", build, shape, small, ids)


def plain(
    library: str, shape: tuple[int, ...], small: tuple[int, ...], make: Callable[[Any], nn.Module]
) -> Entry:
    return Entry(library, lambda package, _: make(package), shape, small)


STAGES = {"hidden_sizes": [16, 32], "depths": [1, 1], "embedding_size": 16}
NEXT = {"hidden_sizes": [8, 16, 32], "depths": [1, 1, 2], "num_stages": 3}
WINDOWS = {"embed_dim": 16, "depths": [1, 2], "num_heads": [2, 2], "window_size": 4}
SWIN = {**WINDOWS, "image_size": 32, "patch_size": 2}
OF_IMAGES = "ForImageClassification"
SMP = "segmentation_models_pytorch"
RESNET: dict[str, Any] = {"encoder_weights": None, "classes": CLASSES}
VOLUME, CUBE = (2, 1, 96, 96, 96), (2, 1, 32, 32, 32)

ZOO: dict[str, Entry] = {
    "vit": transformer(f"ViT{OF_IMAGES}", "ViTConfig", IMAGE),
    "deit": transformer(f"DeiT{OF_IMAGES}", "DeiTConfig", IMAGE),
    "dinov2": transformer(
        f"Dinov2{OF_IMAGES}", "Dinov2Config", {**TOKENS, "image_size": 32, "patch_size": 8}
    ),
    "beit": transformer(f"Beit{OF_IMAGES}", "BeitConfig", IMAGE),
    "vit_msn": transformer(f"ViTMSN{OF_IMAGES}", "ViTMSNConfig", IMAGE),
    "clip_vision": transformer("CLIPVisionModel", "CLIPVisionConfig", IMAGE),
    "siglip_vision": transformer("SiglipVisionModel", "SiglipVisionConfig", IMAGE),
    "swin": transformer(f"Swin{OF_IMAGES}", "SwinConfig", SWIN),
    "swinv2": transformer(f"Swinv2{OF_IMAGES}", "Swinv2Config", SWIN),
    "convnext": transformer(f"ConvNext{OF_IMAGES}", "ConvNextConfig", NEXT),
    "convnextv2": transformer(f"ConvNextV2{OF_IMAGES}", "ConvNextV2Config", NEXT),
    "resnet": transformer(
        f"ResNet{OF_IMAGES}", "ResNetConfig", {**STAGES, "layer_type": "basic"}, small=SMALL
    ),
    "regnet": transformer(
        f"RegNet{OF_IMAGES}", "RegNetConfig", {**STAGES, "groups_width": 8}, small=SMALL
    ),
    "mobilenet_v2": transformer(
        f"MobileNetV2{OF_IMAGES}", "MobileNetV2Config", {"depth_multiplier": 0.35}, small=SMALL
    ),
    "segformer": transformer(f"Segformer{OF_IMAGES}", "SegformerConfig", SEGMENTS, small=SMALL),
    "segformer_masks": transformer(
        "SegformerForSemanticSegmentation", "SegformerConfig", SEGMENTS, small=SMALL
    ),
    "ast": transformer("ASTForAudioClassification", "ASTConfig", MELS, (2, 1024, 128), (2, 64, 32)),
    "wav2vec2": transformer(
        "Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", WAVE, (2, 16000), (2, 1600)
    ),
    "bert": transformer(
        "BertForSequenceClassification",
        "BertConfig",
        {**MLP, "vocab_size": 50},
        (2, 128),
        (2, 12),
        ids=True,
    ),
    "roberta": transformer(
        "RobertaForSequenceClassification",
        "RobertaConfig",
        {**MLP, "vocab_size": 50},
        (2, 128),
        (2, 12),
        ids=True,
    ),
    "smp_unet": plain(SMP, PICTURES, SMALL, lambda smp: smp.Unet("resnet18", **RESNET)),
    "smp_fpn": plain(SMP, PICTURES, SMALL, lambda smp: smp.FPN("resnet18", **RESNET)),
    "smp_deeplab": plain(SMP, PICTURES, SMALL, lambda smp: smp.DeepLabV3Plus("resnet18", **RESNET)),
    "smp_linknet": plain(SMP, PICTURES, SMALL, lambda smp: smp.Linknet("resnet18", **RESNET)),
    "monai_unet": plain(
        "monai",
        VOLUME,
        CUBE,
        lambda monai: monai.networks.nets.UNet(3, 1, CLASSES, (8, 16, 32), (2, 2), num_res_units=1),
    ),
    "monai_swin_unetr": plain(
        "monai",
        (1, 1, 64, 64, 64),
        CUBE,
        lambda monai: monai.networks.nets.SwinUNETR(
            in_channels=1, out_channels=CLASSES, feature_size=12
        ),
    ),
    "monai_densenet": plain(
        "monai",
        VOLUME,
        CUBE,
        lambda monai: monai.networks.nets.DenseNet121(
            spatial_dims=3, in_channels=1, out_channels=CLASSES
        ),
    ),
    "video_x3d": plain(
        "pytorchvideo.models.x3d",
        (1, 3, 13, 160, 160),
        (1, 3, 4, 64, 64),
        lambda x3d: x3d.create_x3d(
            input_clip_length=4, input_crop_size=64, model_num_class=CLASSES
        ),
    ),
    "clip_tower": plain(
        "open_clip", PICTURES, PICTURES, lambda clip: clip.create_model("ViT-B-32").visual
    ),
    "timm_features": plain(
        "timm",
        PICTURES,
        SMALL,
        lambda timm: timm.create_model("mobilenetv3_small_050", num_classes=0),
    ),
    "timm_ghostnet": plain(
        "timm", PICTURES, SMALL, lambda timm: timm.create_model("ghostnet_050", num_classes=0)
    ),
}


def build(name: str, small: bool) -> tuple[nn.Module, Tensor]:
    """A network in eval and a batch.

    Raises:
        ImportError: Its library is not installed.
    """
    entry = ZOO[name]
    library = importlib.import_module(entry.library)
    torch.manual_seed(0)
    return entry.build(library, small).eval(), entry.batch(small)


def tensors(output: Any) -> Iterator[Tensor]:
    """The tensors of any output."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        yield from (t for value in output.values() for t in tensors(value))
    elif isinstance(output, (list, tuple)):
        yield from (t for value in output for t in tensors(value))


def learn_(model: DA3Model, domain: str, batch: Tensor) -> None:
    """Train a new domain for one step."""
    model.add_domain(domain, num_classes=CLASSES if model.plan.head else None)
    model.set_domain(domain)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    sum(t.square().mean() for t in tensors(model(batch)) if t.requires_grad).backward()  # type: ignore[union-attr]
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def outputs(model: nn.Module, batch: Tensor) -> list[Tensor]:
    return list(tensors(model.eval()(batch)))


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def lasts(model: DA3Model, again: DA3Model, batch: Tensor) -> tuple[bool, bool]:
    """Whether a file restores a domain bit for bit, and a second domain leaves the first alone."""
    learn_(model, "first", batch)
    before = outputs(model, batch)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "first.safetensors"
        model.save_domain("first", file)
        again.load_domain(file)
    again.set_domain("first")
    learn_(model, "second", batch)
    model.set_domain("first")
    return same(before, outputs(again, batch)), same(before, outputs(model, batch))


def peak_bytes(network: nn.Module, batch: Tensor) -> int:
    def step() -> None:
        sum(t.square().mean() for t in tensors(network(batch)) if t.requires_grad).backward()  # type: ignore[union-attr]
        for parameter in network.parameters():
            parameter.grad = None

    return measure_step(step, warmup=1, repeats=0).peak_bytes


def row(name: str, small: bool) -> str:
    network, batch = build(name, small)
    model = convert(network, example_inputs=batch)
    again = convert(network, example_inputs=batch)  # compared alike, or another plan might fit
    restored, unchanged = lasts(model, again, batch)
    network.train()
    model.train()
    saved = saved_activation_bytes(network, batch) / saved_activation_bytes(model, batch)
    peak = peak_bytes(network, batch) / peak_bytes(model, batch)
    plan = model.plan
    return (
        f"| {name} | {plan.head or 'none'} | {len(plan.hosts)} | {len(plan.python)} | {saved:.1f} "
        f"| {peak:.1f} | {'yes' if restored else 'NO'} | {'yes' if unchanged else 'NO'} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--small", action="store_true", help="small networks on small batches")
    parser.add_argument("names", nargs="*", help="which ones; by default all")
    options = parser.parse_args()
    names = options.names or list(ZOO)
    for package in dict.fromkeys(["torch", *(ZOO[name].library.split(".")[0] for name in names)]):
        try:
            version = getattr(importlib.import_module(package), "__version__", "?")
        except ImportError:
            version = "not installed"
        print(f"{package} {version}")
    print("\n| network | head | hosts | stay Python | saved | peak | restored | unchanged |")
    print("|---|---|---:|---:|---:|---:|---|---|")
    for name in names:
        try:
            print(row(name, options.small), flush=True)
        except ImportError:
            continue
        except Exception as error:  # noqa: BLE001  # the table goes on
            print(f"| {name} | {type(error).__name__}: {str(error)[:150]} |", flush=True)


if __name__ == "__main__":
    main()
