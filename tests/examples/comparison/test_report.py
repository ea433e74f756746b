"""Scores, tables, pictures and the page, from records that are written by hand."""

import base64
import csv
import io
import itertools
import re

import pytest

DOMAINS = ["a", "b"]
METHODS = ["fine-tuning", "checkpointing", "linear probe", "DA3"]


@pytest.fixture
def records(tmp_path):
    from comparison.records import Records

    found = Records(tmp_path / "finished.jsonl", {})
    accuracies = {
        "fine-tuning": {"a": (0.8, 0.9), "b": (0.6, 0.6)},
        "linear probe": {"a": (0.7, 0.7), "b": (0.5, 0.4)},
        "DA3": {"a": (0.9, 0.9), "b": (0.7, 0.6)},
    }
    for method, domains in accuracies.items():
        for domain, seeds in domains.items():
            for seed, accuracy in enumerate(seeds):
                values = {"accuracy": accuracy, "rate": 1e-3, "curve": [0.3, accuracy]}
                values |= {"stored_parameters": 10, "stored_bytes": 2**20, "steps": 5}
                found.add(("learn", method, domain, str(seed)), {**values, "test_images": 50})
        found.add(("forget", method, "a, b"), {"forgetting": 0.05})
    for place, method in enumerate(METHODS, 1):
        paid = {"kept_bytes": place * 2**20, "peak_bytes": place * 2**21, "step_ms": place * 100.0}
        paid |= {"step_flops": 1e9, "inference_ms": 5.0, "processor": "a chip, 1 thread"}
        found.add(("cost", method), paid)
    return found


@pytest.fixture
def rows(records):
    from comparison.tables import rows_of

    return rows_of(records, METHODS, DOMAINS)


def test_the_decathlon_score():
    from comparison.scores import decathlon_score

    tuned, images = {"a": 0.8, "b": 0.6}, {"a": 100, "b": 100}
    assert decathlon_score(tuned, tuned, images) == pytest.approx(500)
    assert decathlon_score({"a": 1.0, "b": 1.0}, tuned, images) == pytest.approx(2000)
    assert decathlon_score({"a": 0.6, "b": 0.1}, tuned, images) == pytest.approx(0)
    # alpha * (Emax - E)^2 with alpha = 1000 / Emax^2
    expected = 1000 / 0.4**2 * (0.4 - 0.3) ** 2 + 1000 / 0.8**2 * (0.8 - 0.2) ** 2
    assert decathlon_score({"a": 0.7, "b": 0.8}, tuned, images) == pytest.approx(expected)


def test_the_score_of_the_papers_figures():
    from comparison.scores import decathlon_score

    tuned = [59.87, 60.34, 82.12, 92.82, 55.53, 97.53, 81.41, 87.69, 96.55, 51.20]
    tuned = {str(i): value / 100 for i, value in enumerate(tuned)}
    assert decathlon_score(tuned, tuned, dict.fromkeys(tuned, 1000)) == pytest.approx(2500)


def test_a_score_where_fine_tuning_makes_no_error():
    from comparison.scores import decathlon_score

    assert decathlon_score({"a": 1.0}, {"a": 1.0}, {"a": 50}) == pytest.approx(1000)
    assert decathlon_score({"a": 0.98}, {"a": 1.0}, {"a": 50}) == 0


def test_rows(rows):
    tuned, checkpointed, probe, ours = rows
    assert tuned.mean == pytest.approx((0.7 + 0.75) / 2)
    assert tuned.spread == pytest.approx(0.05 / 2**0.5)
    assert checkpointed.accuracy == tuned.accuracy
    assert checkpointed.values["kept MiB"] == 2
    assert tuned.values["decathlon score"] == pytest.approx(500)
    assert tuned.values["forgetting, points"] == pytest.approx(5)
    assert ours.values["stored MiB"] == 1
    # two epochs of five steps on each of two domains, at 400 ms
    assert ours.curve == [(pytest.approx(4), 0.3), (pytest.approx(8), pytest.approx(ours.mean))]
    assert probe.curve[-1][0] == pytest.approx(6)


def test_what_is_not_finished_is_left_out(tmp_path):
    from comparison.records import Records
    from comparison.tables import as_text, rows_of

    found = Records(tmp_path / "some.jsonl", {})
    values = {"accuracy": 0.5, "rate": 1e-3, "curve": [0.5], "stored_parameters": 1}
    values |= {"stored_bytes": 4, "steps": 1, "test_images": 2}
    found.add(("learn", "DA3", "a", "0"), values)
    assert rows_of(found, METHODS, DOMAINS) == []
    (row,) = rows_of(found, METHODS, ["a"])
    assert row.curve == []
    assert "decathlon" not in as_text([row])


def test_tables_as_text_markdown_and_csv(rows):
    from comparison.tables import as_csv, as_markdown, as_text

    text = as_text(rows).splitlines()
    assert len(text) == 1 + 4
    assert "85.0 ± 7.1" in text[1]
    markdown = as_markdown(rows).splitlines()
    assert len({line.count("|") for line in markdown}) == 1
    assert markdown[2].startswith("| fine-tuning | 85.0 ± 7.1 | 60.0 ± 0.0 | 72.5 ± 3.5 | 500 |")
    cells = list(csv.DictReader(io.StringIO(as_csv(rows))))
    assert len(cells) == 4 * 2 * 2
    assert float(cells[1]["accuracy"]) == 0.9
    assert cells[1]["seed"] == "1"
    assert float(cells[0]["peak MiB"]) == 2


def test_rates_at_an_end_of_their_grid_are_marked(rows):
    from comparison.tables import rates_text

    da3 = next(row for row in rows if row.method == "DA3")
    da3.tried = {"a": [1e-3, 3e-3], "b": [3e-4, 1e-3, 3e-3]}
    lines = dict(line.split(" (of ") for line in rates_text(rows).splitlines())
    assert "a 0.001, b 0.001" in lines["fine-tuning"]
    assert lines["DA3"] == "0.0003, 0.001, 0.003): a 0.001*, b 0.001"
    rows[0].tried = {"a": [1e-3], "b": [1e-3]}  # with --rates 1
    assert rates_text(rows).startswith("fine-tuning (of 0.001): a 0.001*")


def test_pictures_say_the_finding_on_linear_axes(rows):
    from comparison.pictures import plot_inference, plot_memory, plot_time

    titles = []
    for plot in (plot_memory, plot_time, plot_inference):
        figure = plot(rows)
        (axes,) = figure.axes
        titles.append(figure.get_suptitle())
        assert (axes.get_xscale(), axes.get_yscale()) == ("linear", "linear")
        assert axes.get_xlim()[0] == 0
        assert {t.get_text() for t in axes.texts} == {*METHODS}
    assert titles[0] == "DA3: 77.5 % at 8 MiB; fine-tuning: 72.5 % at 2 MiB, 0.2x as much"
    assert titles[1].startswith("DA3: 77.5 % at 8 s of training; fine-tuning: 72.5 % at 2 s")


def test_names_in_pictures_do_not_cover_each_other():
    from comparison.pictures import apart

    for heights in ([0.1, 0.1, 0.1], [0.9, 0.99, 1.0, 1.0], [0.2, 0.5], [1.0], []):
        moved = apart(heights, 0.06)
        assert all(b - a >= 0.06 - 1e-9 for a, b in itertools.pairwise(moved))
        assert all(-0.3 <= height <= 1 for height in moved)
    assert apart([0.2, 0.5], 0.06) == [0.2, 0.5]


def test_a_page_that_needs_no_other_file(tmp_path, rows):
    from comparison.report import write_report

    paths = write_report(tmp_path / "out", "4 ways <of> learning", "on a chip", rows)
    pictures = [f"accuracy_{what}.png" for what in ("memory", "time", "inference")]
    names = ["results.csv", "results.md", *pictures, "report.html"]
    assert list(paths) == names
    page = paths["report.html"].read_text()
    assert "4 ways &lt;of&gt; learning" in page
    assert "on a chip" in page
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert [base64.b64decode(p) for p in pictures] == [paths[n].read_bytes() for n in names[2:5]]
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert page.count("<tr>") == 5


def test_without_costs_there_are_no_pictures(tmp_path, rows):
    from comparison.report import write_report

    for row in rows:
        row.curve = []
    assert list(write_report(tmp_path, "t", "a", rows)) == [
        "results.csv",
        "results.md",
        "report.html",
    ]


@pytest.mark.slow
def test_weights_and_biases(tmp_path, rows, monkeypatch):
    wandb = pytest.importorskip("wandb")
    from comparison.report import log_to_wandb, write_report

    monkeypatch.setenv("WANDB_MODE", "offline")
    logged, whole = {}, wandb.init

    def init(**options):
        run = whole(**options)
        logged["run"] = run
        finish = run.finish
        monkeypatch.setattr(run, "finish", lambda: (logged.update(run.summary), finish()))
        return run

    monkeypatch.setattr(wandb, "init", init)
    paths = write_report(tmp_path / "out", "title", "about", rows)
    log_to_wandb(tmp_path, "title", {"epochs": 2}, rows, paths)
    assert logged["run"].config["epochs"] == 2
    assert logged["DA3/accuracy"] == pytest.approx(0.775)
    assert {"results", "accuracy_memory", "accuracy_time"} <= logged.keys()
