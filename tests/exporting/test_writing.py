"""An exported file has operations of ONNX itself, and is written whole or not at all."""

import pytest

pytest.importorskip("onnx")

import torch
from helpers.domains import refused
from onnx import TensorProto, helper

from lightning_da3.errors import CheckpointError, ConversionError
from lightning_da3.exporting import writing
from lightning_da3.exporting.onnx_passes.graph import OPSET, standard_operations
from lightning_da3.exporting.program import Program
from lightning_da3.exporting.writing import Example, write_program
from lightning_da3.files.domain_file import write_domain


def model(*nodes, domains=("",)):
    graph = helper.make_graph(list(nodes), "graph", [], [])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid(d, OPSET) for d in domains])


def branch(*nodes):
    """A node with graphs inside."""
    value = helper.make_tensor_value_info("y", TensorProto.FLOAT, [])
    inner = helper.make_graph(list(nodes), "inner", [], [value])
    return helper.make_node("If", ["c"], ["z"], then_branch=inner, else_branch=inner)


def test_all_are_named_once():
    add, relu = helper.make_node("Add", ["a", "b"], ["y"]), helper.make_node("Relu", ["a"], ["y"])
    assert standard_operations(model(relu, add, branch(relu))) == ["Add", "If", "Relu"]


@pytest.mark.parametrize(
    ("node", "name"),
    [
        (
            helper.make_node("FusedConv", ["a"], ["y"], domain="com.microsoft"),
            "microsoft::FusedConv",
        ),
        (helper.make_node("Nothing", ["a"], ["y"]), "::Nothing"),
        (helper.make_node("Upsample", ["a", "b"], ["y"]), "::Upsample"),  # no longer in the opset
        (branch(helper.make_node("Own", ["a"], ["y"], domain="mine")), "mine::Own"),
    ],
)
def test_others_are_refused(node, name):
    with refused(ConversionError, "ONNX has no operations", name, "format='pt2'"):
        standard_operations(model(node))


def test_other_domains_are_refused():
    with refused(ConversionError, "com.microsoft (opset"):
        standard_operations(model(domains=("", "com.microsoft")))


@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_what_belongs_to_a_file_is_written_with_it(tmp_path, monkeypatch, value):
    def written(program, path, manifest):
        path.write_text("program")
        return lambda inputs: []

    def also():
        write_domain(tmp_path / "a.pt2.safetensors", {"x": torch.tensor(value)}, {})

    def write():
        write_program(
            Program(None, [], []), tmp_path / "a.pt2", "pt2", {}, [Example([], [])], also=also
        )

    monkeypatch.setitem(writing.WRITERS, "pt2", written)
    names = ["a.pt2", "a.pt2.json", "a.pt2.safetensors"]
    if value == 1.0:
        write()
    else:
        names = []
        with refused(CheckpointError, "NaN or infinite values", "a.pt2.safetensors'"):
            write()
    assert sorted(path.name for path in tmp_path.iterdir()) == names
