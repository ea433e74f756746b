"""Products in files of ONNX: the same results, without copies of matrices."""

import numpy as np
import pytest
from helpers.onnx_graphs import drawn, model_of, node, ran

from lightning_da3.exporting.onnx_passes.graph import simplify_


def expanded_product(left):
    """What PyTorch records for a matrix times maps (2, 3, 7, 5), or these times a matrix."""
    steps = []
    if left:  # (4, 7) x (2, 3, 7, 5)
        steps += [node("Expand", "m copies", "e"), node("Reshape", "e folded", "f")]
        steps += [node("Reshape", "x flat", "g")]
        steps += [node("MatMul", "f g", "p"), node("Reshape", "p back", "y")]
        numbers = {"copies": [2, 3, 4, 7], "folded": [6, 4, 7], "flat": [6, 7, 5]}
        numbers["back"] = [2, 3, 4, 5]
    else:  # (2, 3, 7, 5) x (5, 4)
        steps += [node("Reshape", "x flat", "g"), node("MatMul", "g m", "p")]
        steps += [node("Reshape", "p back", "y")]
        numbers = {"flat": [42, 5], "back": [2, 3, 7, 4]}
    return steps, {name: np.array(n) for name, n in numbers.items()}


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("left", [True, False])
def test_a_matrix_for_a_batch_is_not_copied(left, constant):
    steps, held = expanded_product(left)
    m, x = drawn(4, 7, seed=1) if left else drawn(5, 4, seed=1), drawn(2, 3, 7, 5)
    inputs = {"x": [2, 3, 7, 5]} if constant else {"x": [2, 3, 7, 5], "m": list(m.shape)}
    held, fed = ({**held, "m": m}, {"x": x}) if constant else (held, {"x": x, "m": m})
    model = model_of(steps, inputs, ["y"], **held)
    (expected,) = ran(model, **fed)
    simplify_(model, ["y"])
    assert [n.op_type for n in model.graph] == ["MatMul"]
    assert [v.name for v in model.graph.outputs] == ["y"]
    np.testing.assert_allclose(ran(model, **fed)[0], expected, rtol=1e-6)


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("how", ["elsewhere", "output", "two outputs", "another shape"])
def test_what_else_reads_a_product_has_it(left, how):
    steps, held = expanded_product(left)
    m, x = drawn(4, 7, seed=1) if left else drawn(5, 4, seed=1), drawn(2, 3, 7, 5)
    outputs = ["y"]
    if how == "elsewhere":
        steps, outputs = [*steps, node("Relu", "p", "z")], ["y", "z"]
    if how == "output":
        outputs = ["y", "p"]
    if how == "two outputs":
        steps, outputs = [*steps, node("Reshape", "p back", "z")], ["y", "z"]
    if how == "another shape":
        held["back"] = np.array([6, *held["back"][2:]])
    model = model_of(steps, {"x": [2, 3, 7, 5]}, outputs, **held, m=m)
    expected = ran(model, x=x)
    simplify_(model, outputs)
    assert [v.name for v in model.graph.outputs] == outputs
    for found, wanted in zip(ran(model, x=x), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize(
    ("matrix", "copies", "folded", "x"),
    [
        ((4, 7), None, (6, 4, 7), (6, 7, 5)),  # a matrix for every map
        ((2, 1, 4, 7), (2, 3, 4, 7), (6, 4, 7), (6, 7, 5)),  # two matrices
        ((1, 1, 4, 7), (2, 3, 4, 7), (6, 4, 7), (6, 7, 5)),
        ((2, 1), (2, 3), (3, 2, 1), (3, 1, 5)),  # a matrix that is widened
        ((1, 4, 7), (6, 4, 7), None, (1, 7, 5)),  # whose copies make the batch
    ],
)
def test_only_copies_of_one_matrix_are_replaced(matrix, copies, folded, x):
    steps, held, last = [], {}, "m"
    if copies is None:
        matrix = (2, 3, *matrix)
    else:
        held["copies"] = np.array(copies)
        steps, last = [node("Expand", "m copies", "e")], "e"
    if folded is not None:
        held["folded"] = np.array(folded)
        steps, last = [*steps, node("Reshape", f"{last} folded", "f")], "f"
    steps.append(node("MatMul", f"{last} x", "y"))
    inputs = {"m": list(matrix), "x": list(x)}
    model = model_of(steps, inputs, ["y"], **held)
    fed = {"m": drawn(*matrix), "x": drawn(*x, seed=1)}
    (expected,) = ran(model, **fed)
    simplify_(model, ["y"])
    assert any(n.op_type == "Expand" for n in model.graph) is (
        copies is not None and matrix[:2] != (1, 1)
    )
    np.testing.assert_allclose(ran(model, **fed)[0], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("pads", "value", "moves"),
    [
        ([0, 0, 1, 0, 0, 0, 2, 1], 0.0, True),
        ([0, 0, 1, 0, 0, 0, 2, 1], 1.0, False),
        ([0, 1, 1, 0, 0, 0, 2, 1], 0.0, False),  # more channels
        ([0, 0, -1, 0, 0, 0, 2, 1], 0.0, False),
    ],
)
def test_means_of_padded_maps_read_them_without_zeros(pads, value, moves):
    size = [2, 3, 6, 6]
    padded = [n + pads[i] + pads[i + 4] for i, n in enumerate(size)]
    steps = [
        node("Pad", "x pads value", "p"),
        node("MatMul", "left p", "between"),
        node("MatMul", "between right", "means"),
        node("Conv", "p w", "y"),
    ]
    held = {
        "pads": np.array(pads),
        "value": np.array(value, np.float32),
        "left": drawn(2, padded[2], seed=1),
        "right": drawn(padded[3], 2, seed=2),
        "w": drawn(4, padded[1], 1, 1, seed=3),
    }
    model, x = model_of(steps, {"x": size}, ["means", "y"], **held), drawn(*size)
    expected = ran(model, x=x)
    simplify_(model, ["means", "y"])
    (first,) = [n for n in model.graph if n.outputs[0].name == "means"]
    producer = first.inputs[0].producer().inputs[1].producer()
    assert (producer is None) is moves
    for found, wanted in zip(ran(model, x=x), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
