"""The examples are scripts that import each other, from their own folder."""

from importlib.util import find_spec

import pytest
from helpers.examples import EXAMPLES

EXTRAS = ("torchvision", "sklearn", "skimage", "matplotlib", "PIL")
collect_ignore_glob = [] if all(map(find_spec, EXTRAS)) else ["test_*.py", "*/test_*.py"]


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
