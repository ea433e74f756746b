"""Convolutions in files of ONNX: the same results, sooner, and kernels once."""

import numpy as np
import pytest
from helpers.onnx_graphs import drawn, model_of, node, onnx, ran

from lightning_da3.exporting.onnx_passes.convolutions import convolve_transposed_
from lightning_da3.exporting.onnx_passes.graph import constants_of, simplify_


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


@pytest.mark.parametrize(
    ("kernel", "how", "bias", "convolves"),
    [
        ((6, 1, 3, 3), {"group": 6, "pads": [1, 1, 1, 1], "output_padding": [1, 1]}, False, True),
        ((6, 1, 5, 5), {"group": 6, "pads": [2, 1, 2, 2]}, True, True),
        ((6, 1, 3, 3), {"group": 6, "pads": [2, 2, 2, 2]}, False, False),  # zeros would be cut off
        ((6, 1, 5, 3), {"group": 6, "strides": [3, 2], "output_padding": [2, 1]}, False, True),
        ((6, 1, 3, 3), {"group": 6, "dilations": [2, 1], "output_padding": [1, 1]}, False, True),
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
    how = {"strides": [2, 2], **how}
    made = node("ConvTranspose", " ".join(["x", *held]), "y", **how)
    model = model_of([made], {"x": ["n", 6, 7, 7]}, ["y"], **held)
    (expected,) = ran(model, x=x)
    convolve_transposed_(model, constants_of(model), strided=False)
    assert [n.op_type for n in model.graph] == ["ConvTranspose"]
    convolve_transposed_(model, constants_of(model), strided=True)
    assert any(n.op_type == "ConvTranspose" for n in model.graph) is not convolves
    (found,) = ran(model, x=x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_zeros_between_are_the_same_for_every_map_of_a_size():
    how = {"group": 6, "strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]}
    steps = [node("ConvTranspose", "x w", "y", **how), node("ConvTranspose", "x v", "z", **how)]
    held, x = {"w": drawn(6, 1, 3, 3, seed=1), "v": drawn(6, 1, 3, 3, seed=2)}, drawn(2, 6, 7, 7)
    model = model_of(steps, {"x": ["n", 6, 7, 7]}, ["y", "z"], **held)
    expected = ran(model, x=x)
    convolve_transposed_(model, constants_of(model), strided=True)
    shapes = [
        list(v.const_value.shape)
        for v in model.graph.initializers.values()
        if v.const_value.size == 196
    ]
    assert shapes == [[14, 14]]
    for found, wanted in zip(ran(model, x=x), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2])
def test_kernels_of_single_pixels_are_turned_in_every_run(groups):
    inputs = {"x": [1, 4, 9, 9], "w": [4, 6, 1, 1]}
    model = model_of([node("ConvTranspose", "x w", "y", group=groups)], inputs, ["y"])
    fed = {name: drawn(*shape, seed=i) for i, (name, shape) in enumerate(inputs.items())}
    (expected,) = ran(model, **fed)
    simplify_(model, ["y"])
    assert [n.op_type for n in model.graph][-1] == "Conv"
    np.testing.assert_allclose(ran(model, **fed)[0], expected, rtol=1e-5, atol=1e-5)


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
