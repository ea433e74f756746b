"""Bits of masks, packed in integers: a file's runtime reads an eighth of the bytes for it."""

from __future__ import annotations

import importlib
from typing import Any


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
        if powers is None:
            numbers = ir.tensor([[1 << k for k in range(8)]], dtype=uint8, name="powers_of_two")
            powers = ir.Value(name=numbers.name, const_value=numbers)
            model.graph.register_initializer(powers)
        as_bytes = ir.node("Cast", [bits], {"to": uint8.value})
        (value,) = as_bytes.outputs
        value.name, value.dtype, value.shape = f"{bits.name}_bytes", uint8, bits.shape
        packed = ir.node("MatMulInteger", [powers, value])
        (result,) = packed.outputs
        result.name, result.dtype = f"{node.inputs[0].name}_integers", ir.DataType.INT32
        result.shape = node.inputs[0].shape
        model.graph.insert_before(node, [as_bytes, packed])
        node.replace_input_with(0, result)


def _bits_of(ir: Any, node: Any) -> Any:
    """The condition whose bits a node packs; None: it does no such thing."""
    product = node.inputs[0].producer() if _casts_to(ir.DataType.UINT8, node) else None
    if product is None or product.op_type != "MatMul":
        return None
    numbers, cast = product.inputs[0].const_value, product.inputs[1].producer()
    if numbers is None or cast is None or not _casts_to(ir.DataType.FLOAT, cast):
        return None
    bits = cast.inputs[0]
    powers = [float(1 << k) for k in range(8)]
    row = numbers.numpy()
    packs = row.shape[-2:] == (1, 8) and row.ravel().tolist() == powers
    return bits if packs and bits.dtype == ir.DataType.BOOL else None


def _casts_to(dtype: Any, node: Any) -> bool:
    return bool(node.op_type == "Cast" and node.attributes["to"].as_int() == dtype.value)
