"""README and docs: every Python snippet runs, page by page, as a reader would run it."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(<!-- not run[^\n]*-->\n)?```python\n(.*?)```", re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def marks(page):
    return () if page.name in ("README.md", "design.md") else pytest.mark.slow


def blocks(text):
    """Snippets of a page: the line at which each begins, its code, and whether it can run."""
    for found in BLOCK.finditer(text):
        yield text.count("\n", 0, found.start(2)), found[2], found[1] is None


def anchors(text):
    """What links may name behind a #: the headings, as GitHub writes them."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """A folder with photos, and pretrained weights that are random, in place of a download."""
    image = pytest.importorskip("PIL.Image")
    torchvision = pytest.importorskip("torchvision")
    monkeypatch.chdir(tmp_path)
    classes = {"flowers": ("rose", "tulip"), "birds": ("owl", "robin")}
    for domain, names in classes.items():
        for place in (f"{domain}/{part}/{name}" for part in ("train", "val") for name in names):
            folder = tmp_path / "photos" / place
            folder.mkdir(parents=True)
            for number in range(2):
                image.new("RGB", (48, 40), (80 * number, 90, 120)).save(folder / f"{number}.jpg")
    state = torchvision.models.resnet18(weights=None).state_dict()
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", lambda *_, **__: state)


@pytest.mark.filterwarnings("ignore")  # advice of other packages about small data
@pytest.mark.usefixtures("prepared")
@pytest.mark.parametrize("page", [pytest.param(p, marks=marks(p), id=p.name) for p in PAGES])
def test_snippets_run(page):
    pytest.importorskip("matplotlib")
    torch.manual_seed(0)
    names = {"__name__": "snippets"}
    for line, code, runs in blocks(page.read_text()):
        # at the line where it stands in the page, so that a traceback points there
        compiled = compile("\n" * line + code, str(page), "exec")
        if runs:
            exec(compiled, names)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text()):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        other = page.parent / file if file else page
        assert other.exists(), target
        assert not anchor or anchor in anchors(other.read_text()), target


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 250


def test_the_reader_of_snippets():
    text = "a\n```python\nx = 1\n```\n<!-- not run: why -->\n```python\ny\n```\n```bash\nls\n```"
    assert list(blocks(text)) == [(2, "x = 1\n", True), (6, "y\n", False)]
    assert anchors("# A b\n## What's `c`?\n") == {"a-b", "whats-c"}
