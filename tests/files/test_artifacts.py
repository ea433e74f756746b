"""Domains from W&B's artifacts, with a server that is none."""

import shutil
import sys
import types

import pytest
from helpers.lit import CONFIG, network

from lightning_da3 import CheckpointError, convert

NAME = "team/project/project-Net-01234567-a:best"


class Artifact:
    def __init__(self, *files):
        self.files = files

    def download(self, root):
        for file in self.files:
            shutil.copy(file, root)


class Server:
    """Stands for the wandb module.

    Attributes:
        used: Names of artifacts that the open run used.
        read: Names that nobody used, only read.
    """

    def __init__(self, artifact, run="online"):
        self.used, self.read = [], []

        def use(name):
            self.used.append(name)
            return artifact

        def get(name):
            self.read.append(name)
            if artifact is None:
                raise ValueError(f"artifact {name} not found")
            return artifact

        online = types.SimpleNamespace(use_artifact=use, offline=run == "offline")
        self.module = types.SimpleNamespace(
            run=None if run is None else online, Api=lambda: types.SimpleNamespace(artifact=get)
        )


@pytest.fixture
def saved(tmp_path):
    model = convert(network(), CONFIG)
    model.add_domain("a", 2)
    model.save_domain("a", tmp_path / "a.safetensors")
    model.delete_domain("a")
    return model, tmp_path / "a.safetensors"


@pytest.mark.parametrize(
    ("run", "used", "read"),
    [("online", [NAME], []), (None, [], [NAME]), ("offline", [], [NAME])],
)
def test_a_domain_of_an_artifact(saved, monkeypatch, run, used, read):
    model, file = saved
    server = Server(Artifact(file), run)
    monkeypatch.setitem(sys.modules, "wandb", server.module)
    assert model.load_domain(f"wandb:{NAME}", "again") == "again"
    assert model.domains == ["again"]
    assert (server.used, server.read) == (used, read)


def test_an_artifact_that_is_not_there(saved, monkeypatch):
    model, _ = saved
    monkeypatch.setitem(sys.modules, "wandb", Server(None, None).module)
    with pytest.raises(CheckpointError, match=f"Cannot load 'wandb:{NAME}': .*not found"):
        model.load_domain(f"wandb:{NAME}")
    assert model.domains == []


def test_an_artifact_without_a_domain(saved, monkeypatch):
    model, _ = saved
    monkeypatch.setitem(sys.modules, "wandb", Server(Artifact()).module)
    with pytest.raises(CheckpointError, match=r"must hold one domain file, but holds \[\]"):
        model.load_domain(f"wandb:{NAME}")


def test_without_wandb_the_error_says_what_to_install(saved, monkeypatch):
    model, _ = saved
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-da3\[wandb\]'"):
        model.load_domain(f"wandb:{NAME}")
