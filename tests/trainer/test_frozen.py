"""Whatever edits a frozen tensor is found out."""

import pytest
import torch
from helpers.learned import converted

from lightning_da3 import DA3Error
from lightning_da3.trainer.frozen import FrozenTensors


def rolled(w):
    return w.roll(1, 0)


def swapped(w):
    w = w.flatten().clone()
    w[[0, 1]] = w[[1, 0]]
    return w


def signs_of_a_pair(w):
    w = w.flatten().clone()
    w[[0, 5]] *= -1
    return w


def all_signs(w):
    return -w


def one_bit(w):
    w = w.flatten().clone()
    w[3] = torch.nextafter(w[3], torch.tensor(9.0, dtype=w.dtype))
    return w


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("edit", [rolled, swapped, signs_of_a_pair, all_signs, one_bit])
def test_every_edit_is_seen(edit, dtype):
    model = converted("a", "b").to(dtype)
    for module, name in ((model.backbone, "backbone"), (model.domain("b").adapters, "bank.b")):
        frozen = FrozenTensors(model, ["a"])
        frozen.check(model)
        weight = max(module.parameters(), key=torch.numel).data
        before = weight.clone()
        weight.copy_(edit(weight).view_as(weight))
        with pytest.raises(DA3Error, match=rf"1 frozen tensors changed .*\n?.*'{name}\."):
            frozen.check(model)
        weight.copy_(before)
        frozen.check(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.bool, torch.complex128])
def test_of_any_type_and_size(dtype):
    model = converted("a")
    values = (torch.arange(200_000) % 5 > 1).to(dtype)
    model.register_buffer("large", values)
    model.register_buffer("none", values[:0])
    model.register_buffer("one", values[5])
    frozen = FrozenTensors(model, ["a"])
    frozen.check(model)
    model.large = values.roll(1)
    with pytest.raises(DA3Error, match=r"1 frozen tensors changed .*'large'"):
        frozen.check(model)


def test_what_is_learned_may_change():
    model = converted("a")
    frozen = FrozenTensors(model, ["a"])
    for parameter in model.domain("a").parameters():
        parameter.data.add_(1.0)
    frozen.check(model)
