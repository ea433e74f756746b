"""fit_sequence: what comes out, and what is refused."""

import os
from functools import partial

import lightning as L
import pytest
import torch
from helpers.sequences import (
    CONFIG,
    Data,
    DeathError,
    Lit,
    Validated,
    assert_same,
    learn,
    loader,
    logits,
    make_trainer,
    weights,
)
from lightning.pytorch.callbacks import EarlyStopping
from torch import nn

from lightning_da3 import (
    CheckpointError,
    ConfigError,
    DA3Callback,
    DA3Model,
    DomainError,
    DomainFolder,
    DomainTask,
    convert,
    fit_sequence,
)

# --- what comes out


@pytest.mark.slow
def test_what_comes_out(tmp_path):
    tasks = {
        "a": DomainTask(2, loader(), class_names=["cat", "dog"]),
        "b": DomainTask(3, loader()),
    }
    module = learn(tmp_path, tasks=lambda: tasks, max_epochs=1)
    assert module.net.domains == ["a", "b"]
    assert module.net.active_domain is None
    assert module.net.domain("a").class_names == ["cat", "dog"]
    folder = DomainFolder(tmp_path)
    assert folder.names() == ["a", "b"]
    extra = folder.index()["a"]["extra"]
    assert extra["finished"] is True
    assert extra["metrics"]["loss"] > 0
    model = convert(Lit().net, CONFIG)
    folder.load(model, "b")
    again = Lit()
    again.net = model
    assert torch.equal(logits(again, "b"), logits(module, "b"))


@pytest.mark.slow
def test_a_domain_depends_on_no_other(tmp_path):
    learn(tmp_path / "both", max_epochs=1)
    learn(tmp_path / "one", tasks=lambda: {"b": (3, loader())}, max_epochs=1)
    assert_same({"b": weights(tmp_path / "both")["b"]}, weights(tmp_path / "one"))


@pytest.mark.slow
def test_what_is_finished_is_loaded_and_not_touched(tmp_path):
    first = learn(tmp_path, max_epochs=1)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = learn(tmp_path, max_epochs=1, after=0)  # would die at its first batch
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert torch.equal(logits(again, "a"), logits(first, "a"))
    more = learn(
        tmp_path,
        tasks=lambda: {"c": (4, loader()), "a": (2, loader()), "b": (3, loader())},
        max_epochs=1,
    )
    assert more.net.domains == ["c", "a", "b"]
    assert torch.equal(logits(more, "b"), logits(first, "b"))


@pytest.mark.slow
def test_a_network_made_late(tmp_path):
    class Late(Lit):
        def __init__(self):
            super().__init__()
            self.kept = [self.net]
            del self.net

        def configure_model(self):
            if not hasattr(self, "net"):
                self.net = self.kept[0]

    for _ in range(2):  # learned, then loaded
        module = learn(tmp_path, module=Late, max_epochs=1)
        assert isinstance(module.net, DA3Model)
        assert module.net.domains == ["a", "b"]


def test_the_data_module_is_left_as_it_was(tmp_path):
    data = Data()
    learn(tmp_path, module=Validated, tasks=lambda: {"a": (2, data)}, max_epochs=1)
    assert "train_dataloader" not in vars(data)


# --- what is refused


@pytest.mark.parametrize(
    ("tasks", "error", "message"),
    [
        ({}, ConfigError, "`tasks` is empty"),
        ({"a": 2}, ConfigError, r"domain 'a' must be a tuple \(num_classes, train, val, class_n"),
        ({"a": (2,)}, ConfigError, "must be a tuple"),
        ({"../a": (2, None)}, DomainError, "cannot name a domain"),
        ({"con": (2, None)}, DomainError, "is a device"),
        ({"a": (2, None), "A": (2, None)}, DomainError, "differ by case alone"),
        ({"a": (2, None, None, ["x"])}, ConfigError, "each of the 2 classes, got 1"),
    ],
)
def test_wrong_tasks(tmp_path, tasks, error, message):
    with pytest.raises(error, match=message):
        learn(tmp_path / "new", tasks=lambda: tasks)
    assert not (tmp_path / "new").exists()


def test_wrong_arguments(tmp_path):
    with pytest.raises(ConfigError, match="`save_every_n_steps` must be an int, at least 1"):
        learn(tmp_path, every=0)
    with pytest.raises(ConfigError, match="enable_checkpointing=False, but `fit_sequence` resumes"):
        learn(tmp_path, enable_checkpointing=False)
    with pytest.raises(ConfigError, match="Hand them on"):
        fit_sequence(
            Lit, {"a": (2, loader())}, lambda callbacks: make_trainer([]), tmp_path, config=CONFIG
        )


def test_callbacks_that_would_be_lost_are_refused(tmp_path):
    trainer = partial(L.Trainer, callbacks=[EarlyStopping("loss")])
    with pytest.raises(ConfigError, match="callbacks of its own, which would be lost"):
        fit_sequence(Lit, {"a": (2, loader())}, trainer, tmp_path, config=CONFIG)


def test_a_file_of_an_unfinished_domain_is_not_taken_for_a_finished_one(tmp_path):
    saved = DA3Callback("a", 2, config=CONFIG, save_dir=str(tmp_path))
    make_trainer([saved], max_epochs=1, enable_checkpointing=False).fit(Lit(), loader())
    content = saved.path.read_bytes()
    with pytest.raises(CheckpointError, match=r"was not written by a finished `fit_sequence`"):
        learn(tmp_path)
    assert saved.path.read_bytes() == content


@pytest.mark.slow
def test_damage_is_named_and_nothing_is_overwritten(tmp_path):
    with pytest.raises(DeathError):
        learn(tmp_path, after=3)
    (tmp_path / "a.ckpt").write_bytes(b"PK\x03\x04")
    with pytest.raises(CheckpointError, match=r"Cannot read the checkpoint .*a\.ckpt"):
        learn(tmp_path)
    (tmp_path / "a.ckpt").unlink()
    learn(tmp_path, max_epochs=1)
    path = tmp_path / "a.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"Cannot read the domain file .*a\.safetensors"):
        learn(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("name", ["a.ckpt", "a.safetensors"])
def test_what_is_no_file_is_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match="no regular file"):
        learn(tmp_path)


@pytest.mark.parametrize("content", [{}, [], {"state_dict": {}}, 3])
@pytest.mark.slow
def test_a_checkpoint_that_holds_nothing(tmp_path, content):
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"Cannot read the checkpoint .*Delete it"):
        learn(tmp_path)


def test_a_domain_whose_name_differs_by_case_alone_is_not_learned_over(tmp_path):
    (tmp_path / "A.safetensors").write_text("")
    with pytest.raises(DomainError, match="'a' and 'A' differ by case alone"):
        learn(tmp_path)


@pytest.mark.slow
def test_what_a_killed_run_left_half_written_goes_when_its_domain_is_learned(tmp_path):
    left = [f".{name}.{'0' * 32}.tmp" for name in ("a.ckpt", "a.safetensors", "c.safetensors")]
    for name in left:
        (tmp_path / name).write_text("half")
    learn(tmp_path, max_epochs=1)
    assert [path.name for path in tmp_path.glob(".*.tmp")] == left[2:]  # another's, and young


@pytest.mark.slow
def test_fast_dev_run_tries_every_domain_and_writes_nothing(tmp_path):
    module = learn(tmp_path, fast_dev_run=True)
    assert module.net.domains == ["a", "b"]
    assert list(tmp_path.iterdir()) == []
    learn(tmp_path, tasks=lambda: {"a": (2, loader())}, max_epochs=1)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    module = learn(tmp_path, fast_dev_run=True)
    assert module.net.domain("b").num_classes == 3
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.slow
def test_fast_dev_run_leaves_a_checkpoint_to_be_resumed(tmp_path):
    with pytest.raises(DeathError):
        learn(tmp_path, after=3)
    content = (tmp_path / "a.ckpt").read_bytes()
    learn(tmp_path, fast_dev_run=True)
    assert (tmp_path / "a.ckpt").read_bytes() == content


@pytest.mark.slow
def test_a_folder_of_another_backbone_is_found_out_before_training(tmp_path):
    learn(tmp_path, tasks=lambda: {"a": (2, loader())}, max_epochs=1)

    class Other(Lit):
        def __init__(self):
            super().__init__()
            nn.init.ones_(self.net[0].weight)

    with pytest.raises(CheckpointError, match="another backbone"):
        learn(tmp_path, module=Other, after=0)
    assert not (tmp_path / "b.ckpt").exists()


@pytest.mark.slow
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    with pytest.raises(DeathError):
        learn(tmp_path, after=3)
    content = (tmp_path / "a.ckpt").read_bytes()

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(L.Trainer, "save_checkpoint", full)
    with pytest.raises(CheckpointError, match=r"Cannot write the checkpoint .*No space left"):
        learn(tmp_path)
    assert (tmp_path / "a.ckpt").read_bytes() == content


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        *(({"save_every_n_steps": v}, "`save_every_n_steps`") for v in (0, 1.5, "5", True, None)),
        *(({"seed": v}, "`seed` must be an int") for v in (-1, 0.5, "0", True, None, 10**400)),
        *(({"tasks": v}, "`tasks`") for v in (5, [], {}, None, [("a", (2, []))])),
        ({"tasks": {"a": (2, []), "b": (0, [])}}, "`num_classes` must be an int of at least 1"),
        ({"tasks": {"a": (2, [], None, 5)}}, "`class_names` must be a sequence of str"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused_before_anything_is_learned(tmp_path, wrong, message):
    arguments = {"tasks": {"a": (2, [])}, **wrong}
    with pytest.raises(ConfigError, match=message):
        fit_sequence(None, trainer=None, folder=tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()
