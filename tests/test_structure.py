"""Imports go one way. Read from the source: nothing of the package is imported here."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lightning_da3"

# a file or folder may import what stands before it
ORDER = (
    "errors config ops memory checkpointing metrics plotting nn registry functions eager tracing "
    "planning passes rewriting pieces keeping budget prediction state mixing domains accumulating "
    "converting exporting folder hub attaching first_steps refusals binding loaders loggers "
    "callbacks strategies sequence command __main__"
).split()
# the only ones that may import these
DOORS = {
    "lightning": ("callbacks", "strategies", "loggers", "loaders", "sequence"),
    "wandb": ("loggers",),
    "matplotlib": ("plotting", "loggers"),
    "torchmetrics": ("metrics",),
    "torchvision": ("command",),
    "timm": ("command",),
    "sklearn": (),
}
NOT_IN = {"ops": ("torch.fx", "torch.nn.modules"), "nn": ("torch.fx",)}


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def place(path: Path) -> str:
    """The file or folder of `ORDER` that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(source: str, *, everywhere: bool = False) -> Iterator[str]:
    """Modules that a source imports when it is imported itself, dotted.

    Those behind TYPE_CHECKING and inside functions only if `everywhere`.
    """
    waiting: list[ast.AST] = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        later = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        )
        if everywhere or not later:
            waiting += ast.iter_child_nodes(node)


def own(name: str) -> str | None:
    """The file or folder of `ORDER` that an import names, None for other packages."""
    package, _, rest = name.partition(".")
    return rest.split(".")[0] if package == "lightning_da3" else None


def test_the_reader_of_imports():
    source = """
import a.b, c
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import d
try:
    from lightning_da3.ops import bits
except ImportError:
    pass
class K:
    import e
    def f(self):
        import g
"""
    at_import = {"a.b", "c", "typing.TYPE_CHECKING", "lightning_da3.ops.bits", "e"}
    assert set(imports(source)) == at_import
    assert set(imports(source, everywhere=True)) == at_import | {"d", "g"}
    assert own("lightning_da3.ops.bits") == own("lightning_da3.ops") == "ops"
    assert own("torch") is None


def test_every_file_has_its_place():
    places = {place(path) for path in files()} - {"__init__"}
    assert places <= set(ORDER), "give the new file its place in ORDER"
    assert len(set(ORDER)) == len(ORDER)


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    here = place(path)
    if here == "__init__":
        return  # it stands at the very end
    earlier = {*ORDER[: ORDER.index(here) + 1]}
    for name in imports(path.read_text()):
        theirs = own(name)
        assert theirs is None or theirs in earlier, f"{here} may not import {theirs}"


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_other_packages_come_in_by_their_doors(path):
    here, source = place(path), path.read_text()
    for name in imports(source, everywhere=True):
        doors = DOORS.get(name.split(".")[0])
        assert doors is None or here in doors, f"{here} may not import {name}"
    for package in NOT_IN.get(here, ()):
        found = [name for name in imports(source, everywhere=True) if name.startswith(package)]
        assert not found, f"{here} may not import {found}"


def test_files_import_each_other_in_no_circle():
    """Inside a folder, too."""
    graph = {}
    for path in files():
        dotted = ".".join(("lightning_da3", *path.relative_to(PACKAGE).with_suffix("").parts))
        graph[dotted.removesuffix(".__init__")] = set(imports(path.read_text()))
    for name, names in graph.items():
        # `from a.b import c`: c may be a file or something in a.b
        graph[name] = {n if n in graph else n.rpartition(".")[0] for n in names} & set(graph)
    done: set[str] = set()
    while ready := {name for name in graph if name not in done and graph[name] <= done}:
        done |= ready
    assert not set(graph) - done


def test_nothing_is_printed_and_names_say_something():
    for path in files():
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        assert not [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"], path
    names = {path.stem for path in files()}
    assert not names & {"utils", "base", "common", "helpers", "misc"}
