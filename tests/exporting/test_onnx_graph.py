"""What becomes of graphs of ONNX: the same results, sooner and in less memory."""

import numpy as np
import pytest
from helpers.onnx_graphs import drawn, model_of, node, onnx, ran

from lightning_da3.exporting.onnx_passes.graph import constants_of, planned_peak_bytes, simplify_
from lightning_da3.exporting.onnx_passes.order import keep_before_going_on_


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
    keep_before_going_on_(model, "loss", constants_of(model))
    for found, wanted in zip(ran(model, x=x), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
    needed, waiting = set(), [n for n in model.graph if n.op_type == "Sin"]
    while waiting:
        needed.add(waiting[-1].op_type)
        waiting += [v.producer() for v in waiting.pop().inputs if v.producer()]
    assert "ReduceMax" in needed
    count = model.graph.num_nodes()
    keep_before_going_on_(model, "loss", constants_of(model))
    assert model.graph.num_nodes() == count


def test_small_activations_are_not_waited_for():
    steps = [
        node("Exp", "x", "a"),
        node("ReduceMax", "a", "kept", keepdims=0),
        node("ReduceMean", "a", "loss", keepdims=0),
        node("Mul", "loss kept", "new"),
    ]
    model = model_of(steps, {"x": [2, 16]}, ["loss", "new"])
    keep_before_going_on_(model, "loss", constants_of(model))
    assert model.graph.num_nodes() == len(steps)


@pytest.mark.parametrize(
    ("number", "tensor", "shaped"),
    [
        ((), (64, 32, 1, 1), True),
        ((1,), (64, 32, 1, 1), True),
        ((), (64, 32), False),
        ((), (4, 2, 1, 1), False),  # small
        ((1, 1, 1, 1), (64, 32, 1, 1), False),
        ((1, 1, 1), (512, 1), False),  # the result has three axes
        ((32, 1, 1), (64, 32, 1, 1), False),
    ],
)
@pytest.mark.parametrize("op", ["Mul", "Sub"])
def test_single_numbers_have_the_axes_of_what_they_meet(op, number, tensor, shaped):
    a, b = drawn(*number), drawn(*tensor, seed=1)
    steps = [node(op, "a b", "y"), node(op, "b a", "z")]
    model = model_of(steps, {"a": list(number), "b": list(tensor)}, ["y", "z"])
    fed = {"a": np.asarray(a, np.float32), "b": b}
    expected = ran(model, **fed)
    simplify_(model, ["y", "z"])
    assert [n.op_type for n in model.graph] == [*["Reshape"] * shaped, op, op]  # once for both
    for found, wanted in zip(ran(model, **fed), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
