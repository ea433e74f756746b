"""Files of ONNX hold weights, and little else."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_da3 import DA3Config, MemoryConfig, convert
from lightning_da3.exporting.onnx_passes.size import NAMED, compact_

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
helper, FLOAT = onnx.helper, onnx.TensorProto.FLOAT


def value(name, shape):
    return helper.make_tensor_value_info(name, FLOAT, shape)


def branching():
    """``relu(x W)``, or where nothing is positive its half, and its sum for each size of a group.

    A branch reads what lies outside, and one input is left out.
    """

    def branch(operation, *inputs):
        return helper.make_graph(
            [helper.make_node(operation, [*inputs], ["inside"], name="node_in_a_branch")],
            "branch",
            [],
            [value("inside", None)],
        )

    weight = np.random.default_rng(0).standard_normal((16, 32)).astype(np.float32)
    constants = {"weight": weight, "half": np.float32([0.5]), "zero": np.float32([0.0])}
    nodes = [
        helper.make_node("MatMul", ["x", "weight"], ["a_long_name"], name="node_of_a_product"),
        helper.make_node("ReduceMax", ["a_long_name"], ["largest"], keepdims=0),
        helper.make_node("Greater", ["largest", "zero"], ["positive"]),
        helper.make_node("Squeeze", ["positive"], ["is_positive"]),
        helper.make_node(
            "If",
            ["is_positive"],
            ["branched"],
            then_branch=branch("Relu", "a_long_name"),
            else_branch=branch("Mul", "a_long_name", "half"),
        ),
        helper.make_node("Clip", ["branched", "", "largest"], ["clipped"]),
        helper.make_node("Reshape", ["clipped", "sizes"], ["grouped"], allowzero=0),
        helper.make_node("ReduceSum", ["grouped", "axes"], ["0"], keepdims=0),
    ]
    sizes = helper.make_tensor_value_info("sizes", onnx.TensorProto.INT64, [2])
    held = [onnx.numpy_helper.from_array(a, n) for n, a in constants.items()]
    held.append(onnx.numpy_helper.from_array(np.int64([1]), "axes"))
    graph = helper.make_graph(
        nodes, "g", [value("x", [2, 16]), sizes], [value("0", [None])], held,
        value_info=[value("a_long_name", [2, 32]), value("grouped", [8, 8])],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_compact_model_computes_the_same(sign):
    model, small = branching(), branching()
    compact_(small)
    onnx.checker.check_model(small, full_check=True)
    x = sign * np.abs(np.random.default_rng(1).standard_normal((2, 16)).astype(np.float32))
    given = {"x": x, "sizes": np.int64([8, 8])}
    (want,), (got,) = (
        runtime.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"]).run(
            None, given
        )
        for m in (model, small)
    )
    np.testing.assert_array_equal(got, want)


def test_weights_and_what_goes_in_and_out_keep_their_names():
    model = branching()
    compact_(model)
    graph = model.graph
    assert [v.name for v in (*graph.input, *graph.output)] == ["x", "sizes", "0"]
    assert {t.name for t in graph.initializer if len(t.raw_data) >= NAMED} == {"weight"}
    found = [v for node in graph.node for v in node.output]
    assert max(map(len, found)) == 1
    assert found.count("0") == 1  # what comes out is called so
    assert not any(node.name for node in graph.node)
    assert [len(v.type.tensor_type.shape.dim) for v in graph.value_info] == [2]  # of the reshaped
    said = {a.name for node in graph.node for a in node.attribute}
    assert said == {"then_branch", "else_branch", "keepdims"}  # 0 where 1 is the default


def test_a_training_file_holds_hardly_more_than_its_weights(tmp_path):
    torch.manual_seed(0)
    convs = [layer for _ in range(4) for layer in (nn.Conv2d(160, 160, 3, 1, 1), nn.ReLU())]
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(160, 3))
    network = nn.Sequential(nn.Conv2d(3, 160, 3, 2, 1), *convs, *head).eval()
    model = convert(network, verify=False)
    model.add_domain("a", num_classes=3)
    x = torch.randn(2, 3, 16, 16)
    path = model.export_training("a", tmp_path / "a.onnx", x, dynamic_batch=False)
    weights = sum(p.numel() * p.element_size() for p in network.parameters())
    assert path.stat().st_size <= 1.02 * weights
    names = [t.name for t in onnx.load(path).graph.initializer]
    assert len(set(names)) == len(names)


@pytest.mark.slow
def test_weights_stored_in_half_are_so_in_the_file(tmp_path):
    def file(weights):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512))
        config = DA3Config(memory=MemoryConfig(weights=weights))
        model = convert(nn.Sequential(network, nn.ReLU(), nn.Linear(512, 3)).eval(), config)
        model.add_domain("a", num_classes=3)
        path = model.export("a", tmp_path / f"{weights}.onnx", x)
        (found,) = runtime.InferenceSession(path).run(None, {"input": x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), model.run_domain("a", x))
        return path.stat().st_size

    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    frozen = 4 * (64 * 512 + 512 * 512)  # bytes; adapters and the head stay float32
    assert file("same") - file("bfloat16") == pytest.approx(frozen / 2, rel=0.01)
