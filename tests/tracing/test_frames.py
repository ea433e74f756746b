"""Whose function runs."""

import sys

import pytest
import torch

from lightning_da3.tracing.frames import is_user, place


class Spy:
    """Notes the frame that asks it for anything."""

    def __init__(self):
        self.frames = []

    def is_floating_point(self):
        return True

    dtype = torch.float32

    def __getitem__(self, index):
        self.frames.append(sys._getframe(1))
        return 1.0

    def split(self, *args):
        self.frames.append(sys._getframe(1))


def test_functions_of_libraries_beside_pytorch_are_the_users():
    ops = pytest.importorskip("torchvision.ops")
    spy = Spy()
    ops.box_area(spy)
    assert all(map(is_user, spy.frames))
    assert "in box_area" in place(spy.frames)


def test_pytorchs_own_are_not():
    spy = Spy()
    torch.split(spy, 2)
    assert spy.frames
    assert not any(map(is_user, spy.frames))
    assert is_user(sys._getframe())
