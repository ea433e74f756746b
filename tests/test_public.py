"""Networks of public libraries, small: hosts in all blocks from a third on, domains that last."""

import pytest
import torch
from helpers.zoo_public_networks import ZOO
from zoo_public import arguments, build, lasts, outputs

from lightning_da3 import AdapterConfig, DA3Config, convert

CONFIG = DA3Config(adapter=AdapterConfig(hidden_channels=4, max_cells=16))
FOUND = {  # head, hosts, modules that stay Python
    "vit": ("classifier", 3, 0),
    "dinov2": ("classifier", 3, 1),
    "clip_vision": (None, 3, 0),
    "convnext": ("classifier", 5, 0),
    "resnet": ("classifier.1", 2, 0),
    "ast": ("classifier.dense", 3, 0),
    "wav2vec2": ("classifier", 5, 0),
    "bert": ("classifier", 3, 1),
    "siglip_vision": (None, 4, 0),
    "smp_unet": ("segmentation_head.0", 18, 0),
    "cnn_lstm": ("fc", 1, 0),
}


@pytest.mark.parametrize("name", FOUND)
def test_network(name):
    pytest.importorskip(ZOO[name].library)
    network, batch = build(name, small=True)
    method = ZOO[name].method
    model, again = (convert(network, CONFIG, arguments(batch), verify=False) for _ in range(2))
    plan = model.plan
    assert (plan.head, len(plan.hosts), len(plan.python)) == FOUND[name]
    for one, other in zip(
        outputs(model, batch, method), outputs(network, batch, method), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert lasts(model, again, batch, method) == (True, True)
