"""One model of every family of torchvision, beside plain autograd."""

import importlib

import pytest

MODELS = "mobilenet_v3_small lraspp_mobilenet_v3_large".split()
MORE_MODELS = (
    "resnet18 shufflenet_v2_x0_5 alexnet densenet121 mobilenet_v2 efficientnet_b0 regnet_y_400mf "
    "squeezenet1_1 convnext_tiny vit_b_32 swin_t swin_v2_t maxvit_t r3d_18 "
    "fasterrcnn_mobilenet_v3_large_320_fpn raft_small"
).split()


@pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(name, marks=pytest.mark.slow) for name in MODELS),
        *(pytest.param(name, marks=pytest.mark.exhaustive) for name in MORE_MODELS),
    ],
)
def test_a_model_of_every_family_has_the_gradients_of_plain_autograd(name):
    any_model = importlib.import_module("any_model")
    fixed = name.startswith(("vit", "maxvit"))
    row = any_model.measure(name, None if fixed else 96, 2)
    assert name in str(row)
    assert row.error <= 1e-4 or (row.error_64 or 1.0) <= 1e-9
    assert row.cosine >= 0.99
    assert row.tuned > 3 * max(row.default, row.exact)
