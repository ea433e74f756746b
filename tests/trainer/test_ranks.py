"""Two processes on a CPU: each run of `ranks.py` in a process of its own, with a limit of time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ranks
from helpers.skips import BY_DOMAIN, config, network

import lightning_da3
from lightning_da3 import convert
from lightning_da3.files.domain_file import read_domain

pytestmark = pytest.mark.slow

LIMIT_S = 300  # far more than any of them takes; a hang is a failure


def run(name, folder, strategy, **environment):
    """What a run printed, and how it ended."""
    places = [Path(lightning_da3.__file__).parents[1], Path(ranks.__file__).parents[1]]
    paths = [*map(str, places), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.run(
        [sys.executable, "-W", "ignore", ranks.__file__, name, str(folder), strategy],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    return process.stdout + process.stderr, process.returncode


def succeeds(names, folder, strategy):
    """What each of the runs left in its folder; one after the other, in the same two processes."""
    printed, returncode = run(",".join(names), folder, strategy)
    assert returncode == 0, printed
    return [torch.load(folder / name / "learned.pt", weights_only=True) for name in names]


def equal_gradients(folder, learned):
    """Gradients are those of one process with the same global batch."""
    module, _ = ranks.gradients(folder, 1, "auto")
    assert all(0.1 < fraction < 0.9 for fraction in module.fractions)
    assert learned["fractions"] != module.fractions  # so a rank's own budget would be another
    assert len(module.steps) == 2
    torch.testing.assert_close(module.steps, learned["steps"], rtol=1e-4, atol=1e-6)


def equal_gradients_in_pieces(folder, learned):
    module, _ = ranks.gradients(folder, 1, "auto")
    torch.testing.assert_close(module.steps, learned["steps"], rtol=1e-4, atol=1e-6)


def equal_gradients_accumulated(folder, learned):
    module, _ = ranks.gradients(folder, 1, "auto", ranks.UNGATED)
    torch.testing.assert_close(module.steps, learned["steps"], rtol=1e-4, atol=1e-6)


def two_domains_one_after_the_other(folder, learned):
    first = torch.load(folder / "a.ckpt", weights_only=True)["state_dict"]
    last = torch.load(folder / "b.ckpt", weights_only=True)["state_dict"]
    assert not [key for key in last if key.startswith("net.backbone.")]
    for name, value in learned["a"].items():  # learning b left it as it was
        assert torch.equal(value, first[f"net.bank.a.{name}"])
        assert torch.equal(value, last[f"net.bank.a.{name}"])
    for domain in "ab":
        assert any(v.any() for k, v in learned[domain].items() if "value.weight" in k)
        assert (folder / f"{domain}.safetensors").exists()


def interleaved(folder, learned):
    """What got no gradient has none, or DDP would have filled in zeros (checked in the run)."""
    del folder
    assert learned == 2 * 2 * 2  # epochs, domains, batches


def head_start(folder, learned):
    del folder
    model = convert(ranks.Lit().net, ranks.CONFIG)
    model.add_domain("a", 2)
    model.start_head("a", ranks.data())
    torch.testing.assert_close(learned, model.domain("a").head.weight.detach())


def skips(folder, learned):
    del folder
    model = convert(network(), config(gate=BY_DOMAIN))
    assert model.plan.executed_share(learned) <= BY_DOMAIN.target


def saves_the_best(folder, learned):
    del learned
    extra = read_domain(folder / "a.safetensors").metadata["extra"]
    assert extra["metrics"]["score"] == pytest.approx(0.9 + 4.5)
    assert [path.name for path in folder.glob("a.*")] == ["a.safetensors"]


def metrics_add_up(folder, learned):
    del folder
    assert learned["score"] == pytest.approx(250)  # half of the samples are right
    assert learned["matrix"][0, 0] == learned["mean"] == 0.5


def pictures(folder, learned):
    """Rank zero alone draws them."""
    del learned
    drawn = {path.relative_to(folder).as_posix() for path in folder.rglob("*.png")}
    assert {"rank0/da3-gates-a.png", "rank0/da3-executed_shares-a.png"} <= drawn
    assert not [name for name in drawn if not name.startswith("rank0/")]


CHECKS = [
    equal_gradients,
    equal_gradients_in_pieces,
    equal_gradients_accumulated,
    two_domains_one_after_the_other,
    interleaved,
    saves_the_best,
    head_start,
    skips,
]


@pytest.mark.parametrize(
    ("strategy", "checks"),
    [
        ("ddp", [CHECKS[0], metrics_add_up, pictures, skips]),
        pytest.param("ddp", CHECKS[1:], marks=pytest.mark.exhaustive),
        ("da3_ddp", CHECKS),
    ],
)
def test_two_ranks(tmp_path, strategy, checks):
    """All in the same processes: to start them takes longer than what is tested."""
    names = [check.__name__ for check in checks]
    for check, learned in zip(checks, succeeds(names, tmp_path, strategy), strict=True):
        check(tmp_path / check.__name__, learned)


@pytest.mark.exhaustive
def test_every_rank_refuses_a_metric_that_is_not_logged(tmp_path):
    printed, returncode = run("monitors_nothing", tmp_path, "ddp")
    assert returncode != 0
    assert "monitors what is not logged" in printed


@pytest.mark.parametrize("how", ["killed", pytest.param("raises", marks=pytest.mark.exhaustive)])
def test_a_rank_that_dies_ends_the_run_with_an_error(tmp_path, how):
    printed, returncode = run("dies", tmp_path, "ddp", HOW=how)
    assert returncode != 0
    assert not (tmp_path / "dies" / "finished").exists()
    assert ("rank one has had enough" in printed) == (how == "raises")


def test_nan_on_one_rank_ends_the_run_with_an_error(tmp_path):
    printed, returncode = run("nan_on_one_rank", tmp_path, "da3_ddp")
    assert returncode != 0
    assert "The loss of domain 'a' is nan" in printed or "Connection" in printed


@pytest.mark.parametrize(
    "start_method", [pytest.param("spawn", marks=pytest.mark.exhaustive), "fork"]
)
def test_started_processes_give_the_domains_back(tmp_path, start_method):
    (learned,) = succeeds(["started_processes"], tmp_path, start_method)
    assert any(v.any() for k, v in learned["state"].items() if "value.weight" in k)


@pytest.mark.exhaustive
def test_started_processes_that_could_not_give_them_back_are_refused(tmp_path):
    printed, returncode = run("refuses_to_start", tmp_path, "none")
    assert returncode == 0, printed
    assert printed.count("the domains would vanish") == 3
