"""Imports go one way. Read from the source: nothing of the package is imported here."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_da3"

# a file or folder may import what stands before it, and nothing behind it
ORDER = (
    "errors formatting choices schedule torch_private config ops memory nn layers tracing planning "
    "passes eager files budget exporting device model reference verifying converting costs "
    "plotting metrics trainer cli __main__"
).split()
# the only ones that may import these
DOORS = {
    "lightning": ("trainer",),
    "wandb": ("files", "trainer"),
    "matplotlib": ("plotting", "metrics", "trainer"),
    "torchmetrics": ("metrics",),
    "torchvision": ("cli",),
    "timm": ("cli",),
    "huggingface_hub": ("files",),
    "sklearn": (),
    "unittest": (),
}
NOT_IN = {"ops": ("torch.fx", "torch.nn.modules"), "nn": ("torch.fx",)}
LONGEST = 350  # lines of a file
LONGER: set[str] = set()


def files(folder: Path = PACKAGE) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def place(path: Path) -> str:
    """The file or folder of `ORDER` that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(source: str) -> Iterator[str]:
    """Modules that a source imports, dotted: in functions and under TYPE_CHECKING, too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


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
    expected = {"a.b", "c", "typing.TYPE_CHECKING", "lightning_da3.ops.bits", "d", "e", "g"}
    assert set(imports(source)) == expected
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
    here, names = place(path), list(imports(path.read_text()))
    for name in names:
        doors = DOORS.get(name.split(".")[0])
        assert doors is None or here in doors, f"{here} may not import {name}"
    for package in NOT_IN.get(here, ()):
        found = [name for name in names if name.startswith(package)]
        assert not found, f"{here} may not import {found}"


def test_files_import_each_other_in_no_circle():
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


def test_no_folder_exports_a_name_that_hides_a_file_of_it():
    for init in PACKAGE.rglob("__init__.py"):
        inside = {path.stem for path in init.parent.iterdir()}
        given = {name.rpartition(".")[2] for name in imports(init.read_text())}
        assert not inside & given, init


@pytest.mark.parametrize("folder", ["lightning_da3", "examples", "tests"])
def test_files_are_short(folder):
    lines = {str(f.relative_to(ROOT)): f.read_text().count("\n") for f in files(ROOT / folder)}
    assert {name for name, count in lines.items() if count > LONGEST} <= LONGER


def test_tests_import_nothing_from_examples():
    inside = (ROOT / "examples").iterdir()
    theirs = {
        path.stem for path in inside if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    for path in files(ROOT / "tests"):
        if "examples" not in path.parts[len(ROOT.parts) :][:-1]:
            assert not {name.split(".")[0] for name in imports(path.read_text())} & theirs, path


# attributes of PyTorch's classes that have no public name
PRIVATE = set(
    "_version _base _is_view _cdata _sequence_nr _indices _values _orig_mod _compiled_call_impl "
    "_forward_hooks _forward_pre_hooks _backward_hooks _backward_pre_hooks _overloadpacket "
    "_forward_hooks_with_kwargs _reversed_padding_repeated_twice _NormBase _DropoutNd".split()
)
KEEPS_PRIVATE = ("torch_private", "trainer/lightning_private.py")


def private_names(source: str) -> Iterator[str]:
    """What a source names of PyTorch without PyTorch's promise that it stays."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{name}" for name in names]
            for name in names:
                first, *rest = name.split(".")
                if first == "torch" and any(part.startswith("_") for part in rest):
                    yield name
                if name == "torch.utils.flop_counter.flop_registry":
                    yield name
        elif isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            of_torch = dotted.startswith(("torch.", "_aten.", "aten.", "nn.modules."))
            if (
                node.attr in PRIVATE
                or (of_torch and node.attr.startswith("_"))
                or (of_torch and node.attr.endswith("_backward"))
            ):
                yield dotted


def test_the_reader_of_private_names():
    source = """
import torch._dynamo
from torch._subclasses.fake_tensor import is_fake
from torch.nn.modules.module import _IncompatibleKeys
torch._C.anything()
_aten._unsafe_view(x)
torch.ops.aten.silu_backward(x)
self._base(x.add_(1), torch.relu_)
loss.backward()
"""
    assert set(private_names(source)) == {
        "torch._dynamo",
        "torch._subclasses.fake_tensor.is_fake",
        "torch.nn.modules.module._IncompatibleKeys",
        "torch._C",
        "_aten._unsafe_view",
        "torch.ops.aten.silu_backward",
        "self._base",
    }


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_private_parts_of_pytorch_have_one_home(path):
    if not path.relative_to(PACKAGE).as_posix().startswith(KEEPS_PRIVATE):
        assert not set(private_names(path.read_text()))


def test_nothing_is_printed_and_names_say_something():
    for path in files():
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        assert not [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"], path
    names = {path.stem for path in files()}
    assert not names & {"utils", "base", "common", "helpers", "misc"}
