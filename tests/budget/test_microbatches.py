"""How many samples a batch has, and how it is cut into parts."""

from collections import UserDict, namedtuple

import pytest
import torch
from helpers.domains import refused

from lightning_da3 import InputError
from lightning_da3.budget.microbatches import batch_size, cut, samples_in

X = torch.arange(6).view(3, 2)
IMAGES = [torch.zeros(3, 4, 4), torch.ones(3, 5, 5), torch.zeros(3, 6, 6)]  # as long as the batch
Pair = namedtuple("Pair", "x y")


@pytest.mark.parametrize(
    "batch",
    [
        X,
        (X, "all"),
        [X, X],
        Pair(X, None),
        {"x": X},
        ({"x": X}, 1),
        (IMAGES, None),
        {"x": IMAGES},
        UserDict(x=X),
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_every_kind_of_batch_has_three_samples(batch):
    assert samples_in(batch) == 3
    parts = list(cut(batch, [2, 1], lists=True))
    assert [samples_in(part) for part in parts] == [2, 1]
    if not isinstance(batch, UserDict):
        assert {type(part) for part in parts} == {type(batch)}


@pytest.mark.parametrize("batch", [None, 3, (), {}, ("x", X), torch.tensor(1.0)])
def test_what_has_no_samples(batch):
    with refused(InputError, "cannot be split into samples", "a tensor with samples along axis 0"):
        samples_in(batch)


def test_a_network_called_with_a_list_has_no_batch_size():
    assert batch_size((X,), {}) == batch_size((), {"x": X}) == batch_size(({"x": X},), {}) == 3
    assert batch_size((IMAGES,), {}) is None
    assert batch_size((), {}) is None


def test_tensors_are_cut_wherever_they_are_and_all_else_is_in_each_part():
    shared = torch.zeros(5)
    batch = (X, {"deep": [X + 1, shared, "word"]}, (4, 4, 4))
    one, other = cut(batch, [1, 2])
    assert one[0].tolist() == [[0, 1]]
    assert other[0].tolist() == [[2, 3], [4, 5]]
    assert other[1]["deep"][0].tolist() == [[3, 4], [5, 6]]
    assert one[1]["deep"][1] is shared
    assert one[1]["deep"][2] == "word"
    assert one[2] == other[2] == (4, 4, 4)  # a size, say


def test_lists_of_samples_are_cut_where_asked_for():
    targets = [{"label": torch.tensor([i])} for i in range(3)]
    for images in (IMAGES, X):
        one, other = cut((images, targets), [1, 2], lists=True)
        assert one[1] == targets[:1]
        assert other[1] == targets[1:]
    (images, _), (others, _) = cut((IMAGES, targets), [1, 2], lists=True)
    assert images == IMAGES[:1]  # whole images, though their first axis is 3 as well
    assert others == IMAGES[1:]
    one, _ = cut((X, [X, X + 1, X + 2]), [1, 2], lists=True)
    assert [x.shape for x in one[1]] == [(1, 2)] * 3  # three tensors of three samples each
