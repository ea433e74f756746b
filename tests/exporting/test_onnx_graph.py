"""What becomes of graphs of ONNX: the same results, sooner and in less memory."""

import numpy as np
import pytest

from lightning_da3.exporting.onnx_graph import _constants, planned_peak_bytes, simplify_
from lightning_da3.exporting.onnx_order import keep_before_going_on_

onnx = pytest.importorskip("onnx")
ir = pytest.importorskip("onnx_ir")
runtime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def model_of(nodes, inputs, outputs, **constants):
    """An ir model; names and shapes of inputs, names of outputs."""
    ports = [
        onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s) for n, s in inputs.items()
    ]
    ends = [onnx.helper.make_empty_tensor_value_info(name) for name in outputs]
    held = [onnx.numpy_helper.from_array(a, n) for n, a in constants.items()]
    graph = onnx.helper.make_graph(nodes, "g", ports, ends, held)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)])
    model.ir_version = 10
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


def ran(model, **arrays):
    session = runtime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, arrays)


def node(op, inputs, output, **attributes):
    return onnx.helper.make_node(op, inputs.split(), [output], name=output, **attributes)


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    ("shape", "how", "turns"),
    [
        ((4, 6, 3, 3), {"pads": [1, 1, 1, 1]}, True),
        ((4, 6, 1, 1), {}, True),
        ((4, 3, 3, 2), {"group": 2, "dilations": [2, 1], "pads": [1, 0, 2, 1]}, True),
        ((4, 1, 3, 3), {"group": 4}, True),
        ((4, 6, 3, 3), {"strides": [2, 2]}, False),
        ((4, 6, 3, 3), {"pads": [3, 3, 3, 3]}, False),
        ((4, 6, 3), {"pads": [2, 0]}, True),
    ],
)
def test_transposed_convolutions_become_convolutions(shape, how, turns):
    sides = (9,) * (len(shape) - 2)
    made = node("ConvTranspose", "x w", "y", **how)
    inputs, x = {"x": ["n", 4, *sides]}, drawn(2, 4, *sides)
    model = model_of([made], inputs, ["y"], w=drawn(*shape, seed=1))
    (expected,) = ran(model, x=x)
    simplify_(model, ["y"])
    assert any(n.op_type == "ConvTranspose" for n in model.graph) is not turns
    (found,) = ran(model, x=x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_kernel_that_goes_in_is_not_turned():
    inputs = {"x": [1, 4, 9, 9], "w": [4, 6, 3, 3]}
    model = model_of([node("ConvTranspose", "x w", "y")], inputs, ["y"])
    simplify_(model, ["y"])
    assert [n.op_type for n in model.graph] == ["ConvTranspose"]


@pytest.mark.parametrize(("power", "packs"), [(7, True), (6, False)])
def test_bits_are_packed_in_integers(power, packs):
    numbers = np.array([[*(2.0**k for k in range(7)), 2.0**power]], np.float32)
    steps = [
        node("Greater", "x zero", "inside"),
        node("Cast", "inside", "floats", to=onnx.TensorProto.FLOAT),
        node("MatMul", "numbers floats", "product"),
        node("Cast", "product", "y", to=onnx.TensorProto.UINT8),
    ]
    held = {"zero": np.zeros(1, np.float32), "numbers": numbers}
    model, x = model_of(steps, {"x": [8, 30]}, ["y"], **held), drawn(8, 30)
    (expected,) = ran(model, x=x)
    simplify_(model, ["y"])
    kinds = [n.op_type for n in model.graph]
    assert ("MatMulInteger" in kinds, "MatMul" in kinds) == (packs, not packs)
    (found,) = ran(model, x=x)
    np.testing.assert_array_equal(found, expected)
    if packs:
        packed = np.packbits(x > 0, axis=0, bitorder="little")
        np.testing.assert_array_equal(found, packed)
        assert "numbers" not in model.graph.initializers


def test_planned_peak_counts_what_is_alive():
    kb = 1024  # bytes of 256 floats
    steps = [
        node("Exp", "x", "a"),  # x stays: it is the caller's
        node("Reshape", "a flat", "b"),  # a view
        node("MatMul", "b square", "c"),  # b and c
        node("Relu", "c", "d"),  # in the memory of c
        node("Concat", "d d", "e", axis=0),  # d and e, which is twice as large
    ]
    square, flat = np.eye(256, dtype=np.float32), np.array([1, 256])
    model = model_of(steps, {"x": [16, 16]}, ["e"], square=square, flat=flat)
    assert planned_peak_bytes(model) == kb + kb + 2 * kb
    model = model_of(steps, {"x": [16, 16]}, ["e", "b"], square=square, flat=flat)
    assert planned_peak_bytes(model) == kb + kb + kb + 2 * kb
    model = model_of([node("Exp", "x", "a")], {"x": ["n", 16]}, ["a"])
    assert planned_peak_bytes(model) is None


def test_the_forward_waits_for_what_is_kept_of_it():
    """x -> kept, x -> y -> loss; the kept is read behind the loss alone."""
    steps = [
        node("Exp", "x", "a"),
        node("ReduceMax", "a", "kept", keepdims=0),
        node("Sin", "a", "y"),
        node("ReduceMean", "y", "loss", keepdims=0),
        node("Mul", "loss kept", "new"),
    ]
    model = model_of(steps, {"x": ["n", 8192]}, ["loss", "new"])
    x = drawn(2, 8192)
    expected = ran(model, x=x)
    keep_before_going_on_(model, "loss", _constants(model))
    for found, wanted in zip(ran(model, x=x), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
    needed, waiting = set(), [n for n in model.graph if n.op_type == "Sin"]
    while waiting:
        needed.add(waiting[-1].op_type)
        waiting += [v.producer() for v in waiting.pop().inputs if v.producer()]
    assert "ReduceMax" in needed
    count = model.graph.num_nodes()
    keep_before_going_on_(model, "loss", _constants(model))
    assert model.graph.num_nodes() == count


def test_small_activations_are_not_waited_for():
    steps = [
        node("Exp", "x", "a"),
        node("ReduceMax", "a", "kept", keepdims=0),
        node("ReduceMean", "a", "loss", keepdims=0),
        node("Mul", "loss kept", "new"),
    ]
    model = model_of(steps, {"x": [2, 16]}, ["loss", "new"])
    keep_before_going_on_(model, "loss", _constants(model))
    assert model.graph.num_nodes() == len(steps)
