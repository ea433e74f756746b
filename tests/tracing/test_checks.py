"""Networks that are refused."""

import pytest
import torch
import torchvision
from helpers.converted import refused
from torch import nn


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_a_network_with_nothing_to_adapt_is_refused():
    refused(nn.Sequential(nn.ReLU(), nn.Linear(3, 4)), "nothing to adapt", "['Linear', 'ReLU']")
    refused(nn.LSTM(3, 4), "nothing to adapt", "LSTM")


class BranchesOnValues(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Uncopyable(nn.Module):
    def __deepcopy__(self, memo):
        raise RuntimeError("one of a kind")


def test_a_network_that_cannot_be_copied_or_has_no_layers_is_refused():
    refused(BranchesOnValues(), "nothing to adapt", "decides on")
    refused(Uncopyable(), "Uncopyable cannot be copied", "one of a kind")


@pytest.mark.filterwarnings("ignore")  # of PyTorch about its own quantization
def test_a_quantized_network_is_refused_with_its_float_twin():
    torch.backends.quantized.engine = torch.backends.quantized.supported_engines[-1]
    net = torchvision.models.get_model("quantized_shufflenet_v2_x0_5", quantize=True)
    refused(net, "is quantized", "pass no gradient back", "torchvision.models.shufflenetv2.Shuffle")
