"""Real W&B, offline: what a DA3Callback alone gives a run, read back from the run's own file."""

import pytest
from helpers.lit import CONFIG, callback, data, trainer
from helpers.offline import OfflineRun
from helpers.tracked import Validated, fit

from lightning_da3 import fit_sequence


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """Two domains, one after the other, in one run; read back from its own file."""
    pytest.importorskip("wandb")
    pytest.importorskip("matplotlib")
    from lightning.pytorch.loggers import WandbLogger

    folder = tmp_path_factory.mktemp("offline")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        logger = WandbLogger(project="my project", save_dir=folder)
        module = Validated()
        logger.watch(module, log_freq=3)
        fit(folder, logger, module, callback("a"), {"a": data()})
        kept = callback("b", monitor="val/acc/b", mode="max", save_dir=str(folder))
        fit(folder, logger, module, kept, {"a": data(), "b": data(1)})
        logger.experiment.finish()
    return OfflineRun(folder / "wandb"), module


@pytest.fixture
def wandb_offline(monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


@pytest.mark.usefixtures("wandb_offline")
@pytest.mark.parametrize("shared", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_domains_of_a_sequence_are_a_group_of_runs(tmp_path, shared):
    from lightning.pytorch.loggers import WandbLogger

    logs = tmp_path / "logs"
    one = WandbLogger(project="test", save_dir=logs)

    def make(callbacks):
        logger = one if shared else WandbLogger(project="test", save_dir=logs)
        return trainer(
            *(tmp_path, callbacks[0], 1),
            callbacks=callbacks[1:],
            logger=logger,
            enable_checkpointing=True,
            log_every_n_steps=1,
        )

    names = ["dark", "bright"]
    tasks = {"a": (2, data(), data(), names), "b": (2, data(1), data(1))}
    fit_sequence(Validated, tasks, make, tmp_path / "domains", config=CONFIG)
    wandb = pytest.importorskip("wandb")
    wandb.finish()
    read = [OfflineRun(folder) for folder in sorted((logs / "wandb").glob("offline-run-*"))]
    runs = [found.run for found in read]
    kept = [a["metadata"] for found in read for a in found.artifacts if a["type"] == "domain"]
    assert {about["domain"] for about in kept} == {"a", "b"}
    assert len(kept) == 2
    assert all(about["extra"]["finished"] for about in kept)
    assert names in [about.get("class_names") for about in kept]
    assert len({run.run_group for run in runs}) == 1
    assert runs[0].run_group.startswith("domains-")
    assert {run.job_type for run in runs} == ({"a"} if shared else {"a", "b"})


def test_a_run_says_what_it_learned_with(offline):
    run, module = offline
    said = run.config["da3"]
    assert said["config"] == module.net.config.to_dict()
    assert said["fingerprint"] == module.net.fingerprint
    assert (said["network"], said["domains"], said["others"]) == ("Sequential", {"b": 2}, "a")
    assert said["step"]["kept_bytes"] > 0


def test_domains_have_curves_over_their_own_steps(offline):
    run, _ = offline
    for domain in "ab":
        name, step = f"loss/{domain}", f"da3/step/{domain}"
        rows = [row for row in run.history if name in row]
        assert [row[step] for row in rows] == [1, 2, 3, 4, 5, 6]
        assert all(row["loss"] == row[name] for row in rows)
        assert run.metrics[name] == {"step": step, "summary": {"min", "last"}}
    assert not [name for row in run.history for name in row if "/a/b" in name]
    assert "trainer/global_step" in run.metrics  # what has no domain is as ever


def test_the_summary_holds_the_best(offline):
    run, _ = offline
    values = [row["val/acc/b"] for row in run.history if "val/acc/b" in row]
    assert run.summary["val/acc/b"] == {"max": max(values), "last": values[-1]}
    assert run.summary["da3/kept_bytes"] > 0
    assert run.summary["da3/predicted_peak_bytes"] > 0
    assert run.summary["da3/peak_bytes"] > 0
    assert run.summary["da3/kept_times_less"] > 1
    assert 0 <= run.summary["da3/average_accuracy"] <= 1
    assert run.summary["da3/forgetting/a"] == 0


def test_tables_and_pictures(offline):
    run, module = offline
    columns, rows = run.tables("da3/memory_by_layer")[-1]
    assert columns[0] == "place"
    assert sum(row[-1] for row in rows) == run.summary["da3/kept_bytes"]
    ((columns, (first, second)),) = run.tables("da3/accuracies")
    assert columns == ["after", "a", "b"]
    assert (first[0], second[0], first[2]) == ("a", "b", None)
    assert first[1] == second[1]  # nothing is forgotten
    for name in ("memory", "memory_of_a_step", "gates/a", "gates/b", "accuracy_matrix"):
        images = run.images(f"da3/{name}")
        assert images, name
        assert all(path.read_bytes().startswith(b"\x89PNG") for path in images)
    (shares,) = [row[name] for row in run.history if (name := "da3/executed_shares/b") in row]
    assert sum(shares["values"]) == 4 * len(module.net.plan.hosts)


def test_every_domain_is_an_artifact(offline):
    run, module = offline
    found = {a["metadata"]["domain"]: a for a in run.artifacts if a["type"] == "domain"}
    assert list(found) == ["a", "b"]
    backbone = module.net.fingerprint
    for domain, artifact in found.items():
        assert artifact["name"] == f"my_project-Sequential-{backbone[:8]}-{domain}"
        assert {*artifact["aliases"]} == {"latest", "best"}
        assert artifact["files"] == [f"{domain}.safetensors"]
        about = artifact["metadata"]
        assert about["fingerprint"] == backbone
        assert about["file_bytes"] > 1000
        assert "val/acc" in "".join(about["metrics"])


@pytest.mark.slow
def test_what_was_watched_before_the_conversion_is_watched_after_it(offline):
    run, _ = offline
    names = {name for row in run.history for name in row if name.startswith("gradients/")}
    assert "gradients/net.bank.a.head.weight" in names
    assert "gradients/net.bank.b.head.weight" in names
    assert not [name for name in names if "backbone" in name]
