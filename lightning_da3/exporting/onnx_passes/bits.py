"""Bits of masks, packed in integers: a file's runtime reads an eighth of the bytes for it."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from lightning_da3.exporting.onnx_passes.nodes import Nodes


def pack_in_integers_(model: Any) -> None:
    """Let products of bits be computed of bytes.

    ::

        Cast(MatMul(numbers, Cast(bits, float)), uint8)
        becomes   Cast(MatMulInteger(numbers, Cast(bits, uint8)), uint8)

    which is what `lightning_da3.ops.bits` writes; the sum of a byte's bits is below 256.

    What is then unused is left.

    Args:
        model: An ir model; edited in place.
    """
    ir: Any = importlib.import_module("onnx_ir")
    uint8 = ir.DataType.UINT8
    powers: Any = None
    for node in list(model.graph):
        bits = _bits_of(ir, node)
        if bits is None:
            continue
        nodes = Nodes(model, f"{node.outputs[0].name}.packed")
        if powers is None:
            powers = nodes.constant(np.array([[1 << k for k in range(8)]], np.uint8))
        as_bytes = nodes.call("Cast", bits, to=uint8.value)
        as_bytes.dtype, as_bytes.shape = uint8, bits.shape
        result = nodes.call("MatMulInteger", powers, as_bytes)
        result.dtype, result.shape = ir.DataType.INT32, node.inputs[0].shape
        model.graph.insert_before(node, nodes.made)
        node.replace_input_with(0, result)


def _bits_of(ir: Any, node: Any) -> Any:
    """The condition whose bits a node packs; None: it does no such thing."""
    product = node.inputs[0].producer() if _casts_to(ir.DataType.UINT8, node) else None
    if product is None or product.op_type != "MatMul":
        return None
    numbers, cast = product.inputs[0].const_value, product.inputs[1].producer()
    given = product.inputs[0].is_graph_input()
    if numbers is None or given or cast is None or not _casts_to(ir.DataType.FLOAT, cast):
        return None
    bits = cast.inputs[0]
    powers = [float(1 << k) for k in range(8)]
    row = numbers.numpy()
    packs = row.shape[-2:] == (1, 8) and row.ravel().tolist() == powers
    return bits if packs and bits.dtype == ir.DataType.BOOL else None


def _casts_to(dtype: Any, node: Any) -> bool:
    return bool(node.op_type == "Cast" and node.attributes["to"].as_int() == dtype.value)
