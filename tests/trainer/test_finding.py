"""Which part of a LightningModule is the network."""

import lightning as L
import pytest
from helpers.lit import CONFIG, network
from torch import nn
from torchmetrics.image import StructuralSimilarityIndexMeasure

from lightning_da3 import ConfigError, convert
from lightning_da3.trainer.finding import find_backbone


class StyleLoss(nn.Module):
    """Looks through a network of its own."""

    def __init__(self):
        super().__init__()
        self.eye = network()


def module(**children):
    made = L.LightningModule()
    for name, child in children.items():
        setattr(made, name, child)
    return made


def small():
    return nn.Conv2d(3, 3, 1)


@pytest.mark.parametrize(
    ("children", "found"),
    [
        ({"net": network(), "head": nn.Linear(9, 9)}, "net"),  # the only one with convolutions
        ({"net": nn.Linear(9, 9), "measure": StructuralSimilarityIndexMeasure()}, "net"),
        ({"net": network(), "loss": StyleLoss(), "criterion": nn.CrossEntropyLoss()}, "net"),
        ({"net": network(), "teacher": network().requires_grad_(False)}, "net"),  # that trains
        ({"net": network(), "teacher": network()}, "net"),  # which the other is a copy of
        ({"net": network(), "stem": small()}, "net"),  # nearly all parameters
        ({"net": convert(network(), CONFIG), "other": network()}, "net"),  # converted already
    ],
)
def test_the_clear_case_is_found(children, found):
    assert find_backbone(module(**children), None) == found


def test_what_is_unclear_is_listed_with_its_parameters():
    several = module(encoder=network(), decoder=nn.Sequential(network(), small()))
    message = r"'encoder' \(8\d\d\), 'decoder' \(8\d\d\). Name it: DA3Callback\(..., backbone='deco"
    with pytest.raises(ConfigError, match=message):
        find_backbone(several, None)
    with pytest.raises(ConfigError, match=r"of \['norm'\] none has convolutions"):
        find_backbone(module(norm=nn.BatchNorm2d(3)), None)
    with pytest.raises(
        ConfigError, match=r"no submodule 'nett' to take as backbone. It has \['net"
    ):
        find_backbone(module(net=network()), "nett")


class IsTheNetwork(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.fc = small(), nn.Sequential(small()), nn.Linear(3, 2)

    def forward(self, x):
        return self.fc(self.conv2(self.conv1(x)).mean((2, 3)))


@pytest.mark.parametrize("backbone", [None, ""])
def test_a_module_that_is_the_network_is_told_how_to_hold_it(backbone):
    with pytest.raises(ConfigError) as error:
        find_backbone(IsTheNetwork(), backbone)
    first, second = str(error.value).splitlines()
    assert "IsTheNetwork is itself the network: its layers ['conv1', 'conv2', 'fc']" in first
    assert "self.net = Net()" in second
