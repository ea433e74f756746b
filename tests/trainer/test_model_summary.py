"""Lightning's summary shows the user's network, not what it was rewritten to."""

import pickle

import lightning as L
import pytest
import torch
from helpers.lit import Lit, callback, data, trainer
from lightning.pytorch.callbacks import ModelSummary
from torch import nn

from lightning_da3.trainer.model_summary import UsersSummary


class Block(nn.Sequential):
    """Has a name."""


class Blocks(Lit):
    def __init__(self):
        super().__init__("elsewhere")
        self.net = nn.Sequential(
            Block(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
            Block(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 5),
        )
        self.loss = nn.CrossEntropyLoss()

    def forward(self, x):
        return self.net(x)


class Quiet(ModelSummary):
    """Keeps what it would print."""

    def summarize(self, summary_data, *args, **kwargs):
        self.table = dict(summary_data)


IMAGES = torch.zeros(2, 3, 16, 16)


@pytest.mark.parametrize(
    ("depth", "example"), [(0, None), (1, IMAGES), (2, None), (3, IMAGES), (-1, None)]
)
def test_names_and_classes_are_the_users(tmp_path, depth, example):
    module, summary = Blocks(), Quiet(depth)
    module.example_input_array = example
    plain = L.pytorch.utilities.model_summary.summarize(Blocks(), depth)
    trainer(tmp_path, callback(), epochs=1, callbacks=[summary]).fit(module, data())
    if depth == 0:
        assert not hasattr(summary, "table")
        return
    assert summary.table["Name"] == plain.layer_names
    assert summary.table["Type"] == plain.layer_types
    found = UsersSummary(module, depth)
    counts = dict(zip(found.layer_names, found.param_nums, strict=True))
    every = sum(p.numel() for p in module.net.network.parameters())
    assert counts["net"] == every
    if depth == 2:
        assert counts["net.4"] == sum(p.numel() for p in module.net.domain("a").head.parameters())
    if example is not None:
        assert summary.table["In sizes"][0] == "[2, 3, 16, 16]"
    pickle.dumps(summary)
