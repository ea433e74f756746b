"""Kernels that other runtimes lack, computed by those that they have."""

import pytest
import torch
import torch.nn.functional as F
from helpers.ops import randn

from lightning_da3.torch_private.decompositions import TABLE

_SIDES = ([2, 1], [1, 0], [1, 2])  # stride, padding, dilation
_aten = torch.ops.aten
LACKING = {
    "convolution_backward": lambda: (
        *(randn(2, 4, 4, 4), randn(2, 3, 7, 6), randn(4, 3, 3, 2)),
        *([4], *_SIDES, False, [0, 0], 1, [True] * 3),
    ),
    "convolution_backward of groups": lambda: (
        *(randn(2, 4, 5, 5), randn(2, 4, 5, 5), randn(4, 1, 3, 3)),
        *([4], [1, 1], [1, 1], [1, 1], False, [0, 0], 4, [True] * 3),
    ),
    "_adaptive_avg_pool2d": lambda: (randn(2, 3, 7, 5), [3, 2]),
    "_adaptive_avg_pool2d_backward": lambda: (randn(2, 3, 3, 2), randn(2, 3, 7, 5)),
    "upsample_nearest1d_backward": lambda: (randn(2, 3, 7), [7], [2, 3, 3]),
    "upsample_nearest2d_backward": lambda: (randn(2, 3, 7, 5), [7, 5], [2, 3, 3, 2]),
    "avg_pool2d": lambda: (randn(2, 3, 6, 6), [2, 2], [2, 2], [0, 0], False, True, 3),
    "avg_pool2d_backward": lambda: (
        *(randn(2, 3, 3, 3), randn(2, 3, 6, 6)),
        *([3, 3], [2, 2], [1, 1], False, False, None),
    ),
    "avg_pool2d_backward of ceil": lambda: (
        *(randn(2, 3, 3, 3), randn(2, 3, 6, 6)),
        *([3, 3], [2, 2], [0, 0], True, True, None),
    ),
    "max_pool2d_with_indices_backward": lambda: (
        *(randn(2, 3, 3, 3), randn(2, 3, 6, 6), [2, 2], [2, 2], [0, 0], [1, 1], False),
        F.max_pool2d(randn(2, 3, 6, 6), 2, return_indices=True)[1],
    ),
}


@pytest.mark.parametrize("name", LACKING)
def test_kernels_that_runtimes_lack(name):
    arguments = LACKING[name]()
    kernel = getattr(_aten, name.split()[0]).default
    found, expected = TABLE[kernel](*arguments), kernel(*arguments)
    if isinstance(expected, torch.Tensor):
        found, expected = [found], [expected]
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
