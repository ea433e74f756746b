"""What becomes of graphs of ONNX: the same results, sooner and in less memory."""

import numpy as np
import pytest

from lightning_da3.exporting.onnx_passes.graph import constants_of, planned_peak_bytes, simplify_
from lightning_da3.exporting.onnx_passes.order import keep_before_going_on_

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
    ("kernel", "how", "bias", "convolves"),
    [
        ((6, 1, 3, 3), {"group": 6, "pads": [1, 1, 1, 1], "output_padding": [1, 1]}, False, True),
        ((6, 1, 5, 5), {"group": 6, "pads": [2, 1, 2, 2]}, True, True),
        ((6, 1, 3, 3), {"group": 6, "pads": [2, 2, 2, 2]}, False, False),  # zeros would be cut off
        ((6, 4, 1, 1), {"output_padding": [1, 1]}, False, True),
        ((6, 4, 1, 1), {"output_padding": [1, 1]}, True, False),  # that is added to zeros, too
        ((6, 1, 1, 1), {"output_padding": [1, 1], "group": 6}, False, True),
        ((6, 1, 1, 1), {"output_padding": [1, 1], "group": 6}, True, False),
        ((6, 4, 1, 1), {}, False, False),  # ends with the last pixel
        ((6, 4, 3, 3), {"pads": [1, 1, 1, 1], "output_padding": [1, 1]}, False, False),  # more work
    ],
)
def test_strided_transposed_convolutions_become_convolutions(kernel, how, bias, convolves):
    x, held = drawn(2, 6, 7, 7), {"w": drawn(*kernel, seed=1)}
    if bias:
        held["b"] = drawn(kernel[1] * how.get("group", 1), seed=2)
    made = node("ConvTranspose", " ".join(["x", *held]), "y", strides=[2, 2], **how)
    model = model_of([made], {"x": ["n", 6, 7, 7]}, ["y"], **held)
    (expected,) = ran(model, x=x)
    simplify_(model, ["y"])
    assert any(n.op_type == "ConvTranspose" for n in model.graph) is not convolves
    (found,) = ran(model, x=x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("same", [True, False])
def test_kernels_that_were_turned_lie_there_once(same):
    weight = drawn(4, 1, 3, 3, seed=1)
    turned = weight[:, :, ::-1, ::-1] if same else drawn(4, 1, 3, 3, seed=2)
    steps = [
        node("Conv", "x w", "a", group=4, pads=[1, 1, 1, 1]),
        node("Conv", "a w_turned", "y", group=4, pads=[1, 1, 1, 1]),
    ]
    held, x = {"w": weight, "w_turned": np.ascontiguousarray(turned)}, drawn(2, 4, 9, 9)
    model = model_of(steps, {"x": ["n", 4, 9, 9]}, ["y"], **held)
    (expected,) = ran(model, x=x)
    simplify_(model, ["y"])
    assert ("w_turned" in model.graph.initializers) is not same
    np.testing.assert_array_equal(ran(model, x=x)[0], expected)


def expanded_product(left):
    """What PyTorch records for a matrix times maps (2, 3, 7, 5), or these times a matrix."""
    steps = [node("Expand", "m copies", "e")]
    if left:  # (4, 7) x (2, 3, 7, 5)
        steps += [node("Reshape", "e folded", "f"), node("Reshape", "x flat", "g")]
        steps += [node("MatMul", "f g", "p"), node("Reshape", "p back", "y")]
        numbers = {"copies": [2, 3, 4, 7], "folded": [6, 4, 7], "flat": [6, 7, 5]}
        numbers["back"] = [2, 3, 4, 5]
    else:  # (2, 3, 7, 5) x (5, 4)
        steps = [node("Reshape", "x flat", "g"), node("MatMul", "g m", "p")]
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
    np.testing.assert_allclose(ran(model, **fed)[0], expected, rtol=1e-6)


def test_products_of_batches_stay():
    """Every map has a matrix of its own."""
    steps = [node("Reshape", "m flat", "f"), node("MatMul", "f x", "y")]
    inputs = {"m": [2, 3, 4, 7], "x": [6, 7, 5]}
    model = model_of(steps, inputs, ["y"], flat=np.array([6, 4, 7]))
    fed = {"m": drawn(2, 3, 4, 7), "x": drawn(6, 7, 5, seed=1)}
    (expected,) = ran(model, **fed)
    simplify_(model, ["y"])
    assert [n.op_type for n in model.graph] == ["Reshape", "MatMul"]
    np.testing.assert_array_equal(ran(model, **fed)[0], expected)


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


@pytest.mark.parametrize(
    ("residual", "kept", "first"),
    [
        ([2, 4, 6, 6], False, True),
        ([1, 4, 6, 6], False, False),  # not of the convolution's size
        ([2, 4, 6, 6], True, False),  # the sum is read elsewhere
    ],
)
def test_what_an_adapter_adds_comes_last(residual, kept, first):
    steps = [
        node("Conv", "x w", "c"),
        onnx.helper.make_node("Resize", ["a", "", "", "sizes"], ["up"], mode="nearest"),
        node("Add", "up c", "inner"),
        node("Add", "inner r", "y"),
    ]
    inputs = {"x": [2, 3, 6, 6], "a": [2, 4, 3, 3], "r": residual}
    held = {"w": drawn(4, 3, 1, 1, seed=1), "sizes": np.array([2, 4, 6, 6])}
    model = model_of(steps, inputs, ["y", "inner"] if kept else ["y"], **held)
    fed = {name: drawn(*shape, seed=i) for i, (name, shape) in enumerate(inputs.items())}
    expected = ran(model, **fed)
    simplify_(model, ["y"])
    (last,) = [n for n in model.graph if n.outputs[0].name == "y"]
    assert (last.inputs[1].producer() is not None) is first
    for found, wanted in zip(ran(model, **fed), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
