"""An exported file has operations of ONNX itself, and says which."""

import pytest

pytest.importorskip("onnx")

from helpers.domains import refused
from onnx import TensorProto, helper

from lightning_da3.errors import ConversionError
from lightning_da3.exporting.writing import OPSET, _standard_operations


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
    assert _standard_operations(model(relu, add, branch(relu))) == ["Add", "If", "Relu"]


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
        _standard_operations(model(node))


def test_other_domains_are_refused():
    with refused(ConversionError, "com.microsoft (opset"):
        _standard_operations(model(domains=("", "com.microsoft")))
