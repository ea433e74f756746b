"""A domain file and what must be in it, for tests of files."""

import torch

METADATA = {"domain": "flowers", "num_classes": 102, "lr": 0.1, "sizes": [1, {"a": None}]}


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "head.weight": torch.randn(3, 4, generator=generator),
        "head.bias": torch.randn(3, generator=generator).bfloat16(),
        "steps": torch.tensor(7),
        "open": torch.tensor([True, False]),
        "none": torch.empty(0, 5),
    }


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor.detach().cpu(), rtol=0, atol=0)
