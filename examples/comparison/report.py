"""Writes what was found: tables, pictures, one page, and a run of W&B."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comparison.pictures import plot_inference, plot_memory, plot_time
from comparison.records import write_whole
from comparison.tables import FORMATS, Row, as_csv, as_markdown, cells, rates_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NOTES = (
    "Accuracy is on test images, which chose nothing: each learning rate is the best of its grid "
    "on a quarter of the training images (a * marks an end of what was tried).",
    "Decathlon score: 250 a domain is fine-tuning, 1000 is no error.",
    "Forgetting: points lost on a domain once the others were learned. Fine-tuning learns all in a "
    "row on one network, with a head each; of the others each domain's own state is put back. The "
    "accuracies of fine-tuning are of a network of its own for each domain.",
    "Stored: what one domain needs beside the pretrained network, head included; masks as bits.",
    "Kept: what autograd keeps for the backward pass. Peak: above the resting model, forward, "
    "backward and optimizer. A step and an inference are of one batch; FLOPs do not depend on the "
    "machine. Of domains that skip branches, those of the first.",
    "Checkpointing learns what fine-tuning learns, to the bit: its accuracy is fine-tuning's.",
)
STYLE = """body{font:15px/1.45 system-ui,sans-serif;max-width:75rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;font-size:13px;display:block;overflow-x:auto}
td,th{padding:.3rem .55rem;text-align:right;border-bottom:1px solid #ddd;white-space:nowrap}
td:first-child,th:first-child{text-align:left}img{max-width:100%}pre{white-space:pre-wrap}"""


def write_report(folder: Path, title: str, about: str, rows: Sequence[Row]) -> dict[str, Path]:
    """Writes results.csv, results.md, the pictures and report.html; their paths by name.

    Args:
        folder: Where they go.
        title: One line.
        about: A line about the data, the settings and the processor.
        rows: What was found.
    """
    notes = "\n".join(f"* {note}" for note in NOTES)
    rates = "\n".join(f"* {line}" for line in rates_text(rows).splitlines())
    text = f"# {title}\n\n{about}\n\n{as_markdown(rows)}\n\n{notes}\n\nLearning rates:\n\n{rates}\n"
    content = {"results.csv": as_csv(rows).encode(), "results.md": text.encode()}
    measured = [row for row in rows if row.curve]
    pictures = {}
    if measured:
        pictures = {
            "accuracy_memory.png": _png(plot_memory(measured)),
            "accuracy_time.png": _png(plot_time(measured)),
            "accuracy_inference.png": _png(plot_inference(measured)),
        }
    content |= pictures
    content["report.html"] = _page(title, about, rows, pictures).encode()
    for name, value in content.items():
        write_whole(folder / name, value)
    return {name: folder / name for name in content}


def _png(figure: Figure) -> bytes:
    written = io.BytesIO()
    figure.savefig(written, format="png", dpi=150)
    return written.getvalue()


def _page(title: str, about: str, rows: Sequence[Row], pictures: dict[str, bytes]) -> str:
    """One file that needs no other."""
    header, lines = cells(rows)
    table = "".join(
        "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in line) + "</tr>"
        for tag, line in [("th", header), *(("td", line) for line in lines)]
    )
    images = "".join(
        f'<p><img alt="{html.escape(name)}" src="data:image/png;base64,'
        f'{base64.b64encode(picture).decode()}"></p>'
        for name, picture in pictures.items()
    )
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in NOTES)
    title, about, rates = (html.escape(text) for text in (title, about, rates_text(rows)))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style><h1>{title}</h1><p>{about}</p><table>{table}</table>{images}"
        f"<ul>{notes}</ul><h2>Learning rates</h2><pre>{rates}</pre></html>\n"
    )


def log_to_wandb(
    folder: Path, title: str, settings: dict[str, Any], rows: Sequence[Row], paths: dict[str, Path]
) -> None:
    """One run: settings, the table, the pictures, and the figures of every method as summary."""
    import wandb

    run = wandb.init(project="lightning-da3", name=title, dir=folder, config=settings)
    header, lines = cells(rows)
    run.log(
        {
            "results": wandb.Table(columns=header, data=lines),
            **{p.stem: wandb.Image(str(p)) for p in paths.values() if p.suffix == ".png"},
        }
    )
    for row in rows:
        run.summary[f"{row.method}/accuracy"] = row.mean
        for name in FORMATS:
            if name in row.values:
                run.summary[f"{row.method}/{name}"] = row.values[name]
    run.finish()
