"""The examples' parts, quickly; the whole scripts are slow tests."""

import contextlib
import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

EXAMPLES = Path(__file__).parents[2] / "examples"
for extra in ("torchvision", "sklearn", "skimage", "matplotlib", "PIL"):
    pytest.importorskip(extra)


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))


def start(script, *arguments, folder):
    environment = {**os.environ, "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")]
    )
    return subprocess.Popen(
        [sys.executable, str(EXAMPLES / script), *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # what a shell starts in the background ignores interrupts, and so do its children
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


def test_the_quickstart_stays_short():
    assert len((EXAMPLES / "quickstart.py").read_text().splitlines()) <= 40


def test_the_pretrained_network_knows_its_source():
    import learn_domains

    assert learn_domains.source_accuracy() > 0.9


@pytest.mark.parametrize("name", ["digits", "textures", "faces"])
def test_domains(name):
    from datasets import load_domain

    data = load_domain(name, image_size=16)
    for part in (data.train, data.test):
        images, labels = part.tensors
        assert images.shape == (len(labels), 3, 16, 16)
        assert sorted(set(labels.tolist())) == list(range(len(data.classes)))


def test_an_unknown_domain():
    from datasets import load_domain

    with pytest.raises(ValueError, match="digits, textures, faces"):
        load_domain("cats")


def test_characters_are_the_same_for_the_same_seed():
    from datasets import TEST_FONTS, TRAIN_FONTS, draw_characters

    one, _ = draw_characters(TEST_FONTS, 3, seed=1)
    assert one.shape == (3, 3, 48, 48)
    torch.testing.assert_close(draw_characters(TEST_FONTS, 3, seed=1)[0], one)
    assert not set(TEST_FONTS) & set(TRAIN_FONTS)


def test_costs_of_a_step():
    from measure import Step, costs, fastest

    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 2))
    images, labels = torch.rand(5, 3, 2, 2), torch.tensor([0, 1, 0, 1, 0])
    steps = {"a": Step(network, images, labels, torch.optim.SGD)}
    (cost,) = costs(steps, rounds=2).values()
    assert cost.saved_bytes == 5 * 12 * 4 + 5 * 8 * 4 + 5 * 2 * 4 + 5 * 8 + 4  # and the loss's own
    assert cost.peak_bytes > 0
    assert cost.time_ms > 0
    assert fastest({"a": cost}, "a") == "a"


def test_alternating_takes_turns():
    from measure import alternate

    calls = []
    alternate({name: lambda name=name: calls.append(name) for name in "ab"}, rounds=5)
    first, second = 1 + 3, 1 + 2  # one of a turn is not timed
    assert calls == [*"a" * first, *"b" * first, *"a" * second, *"b" * second]


def test_measure_prints_what_was_asked_beside_what_was_measured(capsys):
    import measure

    assert measure.measure("resnet18", batch_size=2, image_size=32, rounds=1)
    assert not measure._row("saved", 10.0, 2.0, 6.0)
    assert measure._row("saved", 10.0, 2.0, 5.0)
    printed = capsys.readouterr().out
    assert "parameters, head apart" in printed
    assert printed.splitlines()[-2].split()[-3:] == ["5.0x", ">=6x", "FAIL"]
    assert printed.splitlines()[-1].split()[-3:] == ["5.0x", ">=5x", "pass"]


def test_medians_by_the_clock_and_of_the_process():
    from measure import alternate

    naps = iter([0.03, 0.001, 0.001, 0.03])
    time_ms = alternate({"nap": lambda: time.sleep(next(naps))}, rounds=3)["nap"]
    assert time_ms.wall_ms >= 1
    assert time_ms.cpu_ms < time_ms.wall_ms


def test_contestants_train_what_they_say():
    import fast
    import torchvision

    def trained(method):
        network = fast.CONTESTANTS[method](torchvision.models.resnet18(num_classes=10))
        return {name for name, p in network.named_parameters() if p.requires_grad}

    biases = trained(fast.BIASES)
    assert trained("linear probe") == {"fc.weight", "fc.bias"}
    assert {name.rsplit(".")[-1] for name in biases - {"fc.weight"}} == {"bias"}
    assert len(biases) == 20 + 2  # one a batch norm, and the head
    assert {name.replace(".block", "") for name in trained("checkpointing")} == biases
    assert len(trained(fast.TUNED)) == 62


def test_checkpointed_blocks_keep_less_and_have_the_same_gradients():
    import fast
    from measure import build

    from lightning_da3.memory import saved_activation_bytes

    x, found = torch.rand(2, 3, 64, 64), {}
    for contestant in (fast.bias_only, fast.checkpointed):
        torch.manual_seed(0)
        network = contestant(build("resnet18", 64))
        kept = saved_activation_bytes(network, x)
        network(x).square().sum().backward()
        gradients = [p.grad for p in network.parameters() if p.requires_grad]
        found[contestant] = (kept, gradients)
    (plain, want), (less, got) = found.values()
    assert less < 0.7 * plain
    torch.testing.assert_close(got, want)


def test_fast_prints_every_contestant_beside_fine_tuning(capsys):
    import fast

    contestants = [fast.DA3, "DA3 exact"]
    assert fast.training("resnet18", 2, image_size=32, rounds=1, contestants=contestants)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.endswith(("st", "ous"))]
    named = [row[:22].strip() for row in rows]
    assert named == [fast.TUNED, fast.BIASES, *contestants]
    assert [float(row.split("x")[0].split()[-1]) for row in rows[:1]] == [1.0]


def test_what_is_too_slow_fails(capsys):
    import fast
    from measure import Cost, Time

    def verdict(ours_ms):
        times = {fast.TUNED: 20.0, fast.BIASES: 9.0, fast.DA3: ours_ms}
        costs = {name: Cost({}, 1, Time(ms, ms)) for name, ms in times.items()}
        return fast._verdict(costs, fast.Asked(2.0, no_slower_than_biases=True))

    assert verdict(9.0)
    assert not verdict(9.5)  # than biases only
    assert not verdict(11.0)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in printed] == [
        "pass",
        "pass",
        "pass",
        "FAIL",
        "FAIL",
        "FAIL",
    ]


def test_inference_is_with_open_gates(capsys):
    import fast
    from measure import build

    model = fast.with_open_gates(build("resnet18", 32))
    model(torch.randn(2, 3, 32, 32))
    assert model.executed_flops_fraction == 1.0
    fast.inference("resnet18", 2, image_size=32, rounds=1)
    assert "no slower than the original" in capsys.readouterr().out


def test_a_domain_adds_its_own_bytes_to_memory(capsys):
    import fast

    fast.switching("resnet18", image_size=32, domains=4)
    own, added = capsys.readouterr().out.splitlines()[3].split(" bytes; each adds ")
    assert own.split()[-1] == added.split()[0]


def test_tracked_bytes_are_those_of_storages_that_live():
    import fast

    before = fast.tracked_bytes()
    tensor = torch.empty(1000)
    views = [tensor[3:], tensor.view(10, 100)]
    assert fast.tracked_bytes() - before == 4000
    del tensor, views
    assert fast.tracked_bytes() == before


def test_finished_work_is_written_and_read_back(tmp_path):
    from results import DA3, Run

    settings = {"seed": 0, "epochs": 1, "most_batches": 4}
    run = Run(tmp_path, settings, None)
    run.accuracy[DA3]["digits"] = 0.5
    run.save()
    again = Run(tmp_path, settings, None)
    again.resume()
    assert again.finished(DA3, "digits")
    assert not again.finished(DA3, "faces")
    with pytest.raises(SystemExit, match="give the same options"):
        Run(tmp_path, {**settings, "epochs": 2}, None).resume()


def test_resuming_nothing_starts_anew(tmp_path):
    from results import DA3, Run

    run = Run(tmp_path, {}, None)
    run.resume()
    assert not run.finished(DA3, "digits")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")
@pytest.mark.parametrize("part", ["kills", "damage", "domains", "checkpoints", "disk"])
def test_durability(part, tmp_path):
    process = start("durability.py", "--quick", part, folder=tmp_path)
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 0, printed
    assert "  yes  " in printed
    assert "  NO   " not in printed


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")
def test_durability_counts_what_goes_wrong(tmp_path, monkeypatch, capfd):
    """On purpose: a writer that is not atomic, a reader that believes what it reads."""
    import durability

    from lightning_da3.files import domain_file as checkpointing
    from lightning_da3.model import model as domains

    scale = durability.Scale(damaged=13, races=20)
    with monkeypatch.context() as patch:
        patch.setattr(checkpointing, "_checksum", lambda *_: "")
        assert not durability.damage(scale, tmp_path / "damage")
    with monkeypatch.context() as patch:
        patch.setattr(domains, "check_tensors", lambda *_: None)
        assert not durability.damage(scale, tmp_path / "shapes")

    @contextlib.contextmanager
    def in_place(target):
        yield target

    monkeypatch.setattr(checkpointing, "replacing", in_place)
    (tmp_path / "disk").mkdir()
    assert not durability.disk(scale, tmp_path / "disk")
    assert "  NO   " in capfd.readouterr().out


@pytest.mark.slow
def test_fast(tmp_path):
    options = "--models resnet18 --batch-sizes 1 2 --image-size 64 --steps 1 --contestants DA3"
    process = start("fast.py", *options.split(), folder=tmp_path)
    printed, _ = process.communicate(timeout=600)
    assert process.returncode in (0, 1), printed  # 1: not as fast as asked
    assert printed.count("medians of 1 steps") == printed.count("one domain active") == 2
    assert "resnet18 with 100 domains" in printed
    wrong = start("fast.py", "inferrence", folder=tmp_path)
    assert "there are no parts ['inferrence']" in wrong.communicate(timeout=600)[0]


@pytest.mark.slow
def test_quickstart(tmp_path):
    process = start("quickstart.py", folder=tmp_path)
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 0, printed
    assert "kept for the backward pass" in printed
    assert (tmp_path / "outputs" / "quickstart" / "digits.safetensors").exists()


@pytest.mark.slow
def test_budget(tmp_path):
    process = start("budget.py", "--quick", folder=tmp_path)
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 0, printed
    assert "pieces of" in printed
    assert "gradients add up" in printed
    assert not list(tmp_path.iterdir())


def test_mixed_ways_give_the_same():
    import mixed
    from datasets import load_domain
    from network import build_network

    from lightning_da3 import convert

    data = {domain: load_domain(domain) for domain in mixed.DOMAINS}
    images, labels, domains = mixed.shuffled_test(data, each=2)
    assert sorted(domains) == sorted(2 * mixed.DOMAINS)
    model = convert(build_network()).eval()
    for domain in mixed.DOMAINS:
        model.add_domain(domain, len(data[domain].classes))
    with torch.no_grad():
        ways = [way(model, images, domains) for way in (mixed.by_domain, mixed.one_by_one)]
        for scores in ways:
            torch.testing.assert_close(scores, model(images, domains=domains), rtol=1e-4, atol=1e-4)
        known = mixed._right(model, images, labels, domains, domains)
        classes = [int(scores.argmax()) for scores in ways[0]]
        assert known == [c == label for c, label in zip(classes, labels.tolist(), strict=True)]
        others = ["digits" if name != "digits" else "faces" for name in domains]
        assert not any(mixed._right(model, images, labels, domains, others))


@pytest.mark.slow
def test_mixed(tmp_path):
    process = start("mixed.py", "--quick", folder=tmp_path)
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 0, printed
    assert "one pass for all" in printed
    assert "right classes, nearest domains" in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_cli(tmp_path):
    pytest.importorskip("jsonargparse")
    process = start("cli.py", "fit", "--trainer.limit_train_batches", "3", folder=tmp_path)
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 0, printed
    assert (tmp_path / "outputs" / "cli" / "digits.safetensors").exists()
    assert "hidden_channels: 12" in (tmp_path / "outputs" / "cli" / "config.yaml").read_text()


@pytest.mark.slow
def test_an_interrupted_demonstration_goes_on_where_it_was(tmp_path):
    options = ["--smoke", "--output", "out"]
    process = start("learn_domains.py", *options, folder=tmp_path)
    finished = tmp_path / "out" / "finished.json"
    deadline = time.monotonic() + 300
    while not finished.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "Interrupted. Finished and kept" in printed, printed
    assert "digits" in json.loads(finished.read_text())["accuracy"]["DA3"]

    process = start("learn_domains.py", *options, "--resume", "--logger", "wandb", folder=tmp_path)
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 0, printed
    assert "DA3 learned digits before" in printed
    assert "yes  outputs of earlier domains are bit-identical" in printed
    names = {path.name for path in (tmp_path / "out").glob("*.png")}
    each = {
        f"{what}_{d}.png" for what in ("gates", "step") for d in ("digits", "textures", "faces")
    }
    assert names == {"memory.png", "accuracy_matrix.png", *each}
    assert len(list((tmp_path / "out" / "logs").glob("*/metrics.csv"))) >= 8
    assert list((tmp_path / "out" / "wandb").glob("offline-run-*/*.wandb"))


QUICK_MODELS = (
    "resnet18 alexnet densenet121 mobilenet_v2 mobilenet_v3_small efficientnet_b0 regnet_y_400mf "
    "shufflenet_v2_x0_5 squeezenet1_1 convnext_tiny vit_b_32 swin_t swin_v2_t maxvit_t r3d_18 "
    "lraspp_mobilenet_v3_large fasterrcnn_mobilenet_v3_large_320_fpn raft_small"
).split()


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK_MODELS)
def test_a_model_of_every_family_has_the_gradients_of_plain_autograd(name):
    any_model = importlib.import_module("any_model")
    fixed = name.startswith(("vit", "maxvit"))
    row = any_model.measure(name, None if fixed else 96, 2)
    assert name in str(row)
    assert row.error <= 1e-4 or (row.error_64 or 1.0) <= 1e-9
    assert row.cosine >= 0.99
    assert row.tuned > 3 * max(row.default, row.exact)
