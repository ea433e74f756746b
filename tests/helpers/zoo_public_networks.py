"""Public networks, each as its library makes it, of its own size and small."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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
        inputs: What the network takes, of the batch; a tuple is several arguments.
        method: What is called of the network.
    """

    library: str
    build: Callable[[Any, bool], nn.Module]
    shape: tuple[int, ...]
    small: tuple[int, ...]
    ids: bool = False
    inputs: Callable[[Tensor], Any] = lambda x: x
    method: str = "forward"

    def batch(self, small: bool) -> Any:
        shape = self.small if small else self.shape
        return self.inputs(torch.randint(50, shape) if self.ids else torch.randn(shape))


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
    library: str,
    shape: tuple[int, ...],
    small: tuple[int, ...],
    make: Callable[[Any], nn.Module],
    **others: Any,
) -> Entry:
    return Entry(library, lambda package, _: make(package), shape, small, **others)


class Sensors(nn.Module):
    """A classifier of sensors' signals: convolutions, then LSTM or GRU."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            *(nn.Conv1d(9, 64, 5, 2, 2), nn.BatchNorm1d(64), nn.ReLU()),
            *(nn.Conv1d(64, 64, 5, 2, 2), nn.BatchNorm1d(64), nn.ReLU()),
            *(nn.Conv1d(64, 128, 5, 2, 2), nn.BatchNorm1d(128), nn.ReLU()),
        )
        self.rnn = kind(128, 128, 2, batch_first=True)  # type: ignore[arg-type]
        self.fc = nn.Linear(128, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(self.conv(x).transpose(1, 2))[0][:, -1])  # type: ignore[no-any-return]


class Byol(nn.Module):
    """A feature extractor, and the heads of self-supervised learning in one module."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = self._mlp(512, 64)
        self.predictor = self._mlp(64, 64)

    def _mlp(self, size: int, out: int) -> nn.Module:
        return nn.Sequential(
            nn.Linear(size, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, out)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.projector(self.backbone(x))
        return self.predictor(z), z


def featureless(network: Any) -> nn.Module:
    network.fc = nn.Identity()
    return network  # type: ignore[no-any-return]


def slow_and_fast(library: Any, small: bool) -> nn.Module:
    side = 2 if small else 7
    pools = ((8, side, side), (32, side, side))
    made: nn.Module = library.create_slowfast(
        model_num_class=CLASSES, head_pool_kernel_sizes=pools, model_depth=18 if small else 50
    )
    return made


def video(kind: str, small: tuple[int, ...] = (1, 3, 8, 32, 32), side: int = 112) -> Entry:
    def make(models: Any) -> nn.Module:
        return getattr(models, kind)(weights=None, num_classes=CLASSES)  # type: ignore[no-any-return]

    return plain("torchvision.models.video", (1, 3, 16, side, side), small, make)


def segmentation(kind: str) -> Entry:
    def make(models: Any) -> nn.Module:
        made: nn.Module = getattr(models, kind)(
            weights=None, weights_backbone=None, num_classes=CLASSES
        )
        return made

    return plain("torchvision.models.segmentation", PICTURES, SMALL, make)


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
        (1, 1, 64, 64, 64),
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
    "clip_images": plain(
        "open_clip",
        PICTURES,
        PICTURES,
        lambda clip: clip.create_model("ViT-B-32"),
        method="encode_image",
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
    "smp_unet_bands": plain(
        SMP,
        (2, 13, 224, 224),
        (2, 13, 64, 64),
        lambda smp: smp.Unet("resnet18", in_channels=13, **RESNET),
    ),
    "slowfast": Entry(
        "pytorchvideo.models.slowfast",
        slow_and_fast,
        (1, 3, 32, 224, 224),
        (1, 3, 32, 64, 64),
        inputs=lambda x: [x[:, :, ::4].contiguous(), x],
    ),
    "conformer": plain(
        "torchaudio",
        (2, 400, 80),
        (2, 48, 80),
        lambda audio: audio.models.Conformer(80, 4, 128, 4, 31),
        inputs=lambda x: (x, torch.full((len(x),), x.shape[1])),
    ),
    "r3d_18": video("r3d_18"),
    "mc3_18": video("mc3_18"),
    "mvit_v2": video("mvit_v2_s", (1, 3, 16, 224, 224), 224),
    "deeplabv3": segmentation("deeplabv3_mobilenet_v3_large"),
    "fcn": segmentation("fcn_resnet50"),
    "lraspp": segmentation("lraspp_mobilenet_v3_large"),
    "byol": plain(
        "torchvision.models", PICTURES, SMALL, lambda models: Byol(featureless(models.resnet18()))
    ),
    "cnn_lstm": plain("torch", (8, 9, 512), (2, 9, 64), lambda _: Sensors(nn.LSTM)),
    "cnn_gru": plain("torch", (8, 9, 512), (2, 9, 64), lambda _: Sensors(nn.GRU)),
}
