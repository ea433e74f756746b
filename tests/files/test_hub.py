"""Domains to a hub and back. The hub is a folder; its calls are checked against the real ones."""

import shutil
from unittest.mock import create_autospec

import pytest
import torch
from helpers import models

from lightning_da3 import (
    AdapterConfig,
    CheckpointError,
    DA3Config,
    DomainError,
    convert,
    pull_domain,
    push_domain,
)

huggingface_hub = pytest.importorskip("huggingface_hub")
CONFIG = DA3Config(adapter=AdapterConfig(hidden_channels=2, min_stride=1))
REPO = "someone/domains"


@pytest.fixture
def hub(tmp_path):
    """An HfApi whose repositories are folders."""
    api = create_autospec(huggingface_hub.HfApi, instance=True)

    def create_repo(repo_id, *, private=None, exist_ok=False):
        (tmp_path / "hub" / repo_id).mkdir(parents=True, exist_ok=exist_ok)

    def upload_file(*, path_or_fileobj, path_in_repo, repo_id, commit_message):
        shutil.copy(path_or_fileobj, tmp_path / "hub" / repo_id / path_in_repo)

    def hf_hub_download(repo_id, filename, *, revision=None):
        path = tmp_path / "hub" / repo_id / filename
        if not path.exists():
            raise huggingface_hub.errors.LocalEntryNotFoundError(f"no {filename}")
        return str(path)

    api.create_repo.side_effect = create_repo
    api.upload_file.side_effect = upload_file
    api.hf_hub_download.side_effect = hf_hub_download
    return api


def model(*names):
    made = convert(models.randomise_(models.zoo("Residual")), CONFIG)
    for name in names:
        made.add_domain(name, 2)
        with torch.no_grad():
            for parameter in made.domain(name).parameters():
                parameter.normal_()
    return made


@pytest.fixture
def saved(tmp_path):
    model("flowers").save_domain("flowers", tmp_path / "mine.safetensors")
    return tmp_path / "mine.safetensors"


def test_what_is_pushed_is_pulled(hub, saved, tmp_path):
    assert push_domain(saved, REPO, private=True, api=hub) == "flowers"
    path = pull_domain(REPO, "flowers", tmp_path / "pulled", revision="main", api=hub)
    assert path == tmp_path / "pulled" / "flowers.safetensors"
    assert path.read_bytes() == saved.read_bytes()
    assert model().load_domain(path) == "flowers"
    assert hub.create_repo.call_args.kwargs["private"] is True
    assert hub.hf_hub_download.call_args.kwargs["revision"] == "main"


def test_a_damaged_file_is_not_pushed(hub, saved):
    saved.write_bytes(saved.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="Cannot read the domain file"):
        push_domain(saved, REPO, api=hub)
    hub.create_repo.assert_not_called()


def test_what_is_damaged_there_is_not_kept_and_the_good_file_stays(hub, saved, tmp_path):
    push_domain(saved, REPO, api=hub)
    there = tmp_path / "hub" / REPO / "flowers.safetensors"
    path = pull_domain(REPO, "flowers", tmp_path / "pulled", api=hub)
    there.write_bytes(there.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="Cannot read the domain file"):
        pull_domain(REPO, "flowers", tmp_path / "pulled", api=hub)
    assert path.read_bytes() == saved.read_bytes()
    assert list((tmp_path / "pulled").iterdir()) == [path]


def test_what_is_not_there(hub, tmp_path):
    with pytest.raises(CheckpointError, match=r"Cannot pull the domain 'x' from 'someone/domains'"):
        pull_domain(REPO, "x", tmp_path, api=hub)


def test_a_server_that_refuses(hub, saved):
    hub.upload_file.side_effect = OSError("403 Forbidden")
    with pytest.raises(CheckpointError, match=r"Cannot push .* to 'someone/domains': 403"):
        push_domain(saved, REPO, api=hub)


def test_a_path_is_no_name(hub, tmp_path):
    with pytest.raises(DomainError, match="cannot name a domain"):
        pull_domain(REPO, "../x", tmp_path, api=hub)
    hub.hf_hub_download.assert_not_called()


def test_a_name_that_differs_from_another_s_by_case_is_not_pulled(hub, saved, tmp_path):
    push_domain(saved, REPO, api=hub)
    path = pull_domain(REPO, "flowers", tmp_path / "pulled", api=hub)
    with pytest.raises(DomainError, match="'Flowers' and 'flowers' differ by case alone"):
        pull_domain(REPO, "Flowers", tmp_path / "pulled", api=hub)
    assert list((tmp_path / "pulled").iterdir()) == [path]


def test_without_the_extra(saved, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-da3\[hub\]'"):
        push_domain(saved, REPO)
