"""Exported files that are made by hand, in no time: one linear layer, and cross entropy."""

import json

import numpy as np
from onnx import TensorProto, helper, numpy_helper, save_model

from lightning_da3.files.content import write_content
from lightning_da3.files.stored import Stored

FEATURES, CLASSES, CELLS = 4, 3, 2
SHAPES = {"head.weight": [CLASSES, FEATURES], "head.bias": [CLASSES]}
ABOUT = {
    "domain": "a",
    "num_classes": CLASSES,
    "config": {"version": 2, "adapter": {}, "gate": {"target": 0.4}, "head": "auto"},
    "network": "Linear",
    "backbone": "b" * 64,
    "architecture": "c" * 64,
    "plan": "d" * 64,
}


def learnable(count, seed=0):
    """Features and classes that a linear layer can tell apart."""
    numbers = np.random.default_rng(seed)
    labels = numbers.integers(CLASSES, size=count)
    x = 0.3 * numbers.standard_normal((count, FEATURES)) + np.eye(CLASSES, FEATURES)[labels]
    return x.astype(np.float32), labels


def start(seed=0):
    numbers = np.random.default_rng(seed)
    return {n: numbers.standard_normal(shape).astype(np.float32) for n, shape in SHAPES.items()}


def write_start(path, tensors=None, **about):
    tensors = start() if tensors is None else tensors
    pairs = [(name, Stored.of(array)) for name, array in tensors.items()]
    write_content(path, pairs, {**ABOUT, "extra": {}, **about})
    return path


def inference_file(path, *, batch="batch", **about):
    scores = helper.make_node("Gemm", ["input", *SHAPES], ["output"], transB=1)
    inputs = {"input": [batch, FEATURES], **SHAPES}
    return _written(path, "inference", [scores], inputs, {"output": [batch, CLASSES]}, about)


def training_file(path, *, batch="batch", accumulate=False, gates=True, **about):
    """A step of SGD; the noise and the target of the gates go in, but nothing comes of them."""
    nodes = [
        helper.make_node("Gemm", ["input", *SHAPES], ["scores"], transB=1),
        helper.make_node("LogSoftmax", ["scores"], ["logs"]),
        helper.make_node("Softmax", ["scores"], ["chances"]),
        helper.make_node("OneHot", ["targets", "classes", "zero_one"], ["wanted"]),
        helper.make_node("Mul", ["logs", "wanted"], ["right"]),
        helper.make_node("ReduceSum", ["right", "last"], ["each"], keepdims=0),
        helper.make_node("Neg", ["each"], ["losses"]),
        helper.make_node("ReduceMean", ["losses"], ["loss"], keepdims=0),
        helper.make_node("Sub", ["chances", "wanted"], ["difference"]),
        helper.make_node("Shape", ["targets"], ["samples"]),
        helper.make_node("Cast", ["samples"], ["count"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["difference", "count"], ["slope"]),
        helper.make_node("Gemm", ["slope", "input"], ["grad.head.weight"], transA=1),
        helper.make_node("ReduceSum", ["slope", "first"], ["grad.head.bias"], keepdims=0),
    ]
    inputs = {"input": [batch, FEATURES], "targets": [batch]}
    if gates:
        inputs |= {"gate_target": [], "noise": [batch, CELLS]}
    inputs |= {**SHAPES, "learning_rate": []}
    outputs = {"loss": [], **{f"new.{n}": shape for n, shape in SHAPES.items()}}
    if accumulate:
        inputs |= {"weight": [], "apply": [], **{f"gradient.{n}": s for n, s in SHAPES.items()}}
        outputs |= {f"new.gradient.{n}": shape for n, shape in SHAPES.items()}
        nodes.append(helper.make_node("Cast", ["apply"], ["applies"], to=TensorProto.BOOL))
    for name in SHAPES:
        nodes += _updated(name, accumulate)
    return _written(path, "training", nodes, inputs, outputs, {"loss": "cross_entropy", **about})


def _updated(name, accumulate):
    grad = f"sum.{name}" if accumulate else f"grad.{name}"
    step = [
        helper.make_node("Mul", ["learning_rate", grad], [f"move.{name}"]),
        helper.make_node("Sub", [name, f"move.{name}"], [f"moved.{name}"]),
    ]
    if not accumulate:
        return [*step, helper.make_node("Identity", [f"moved.{name}"], [f"new.{name}"])]
    return [
        helper.make_node("Mul", ["weight", f"grad.{name}"], [f"part.{name}"]),
        helper.make_node("Add", [f"gradient.{name}", f"part.{name}"], [grad]),
        *step,
        helper.make_node("Where", ["applies", f"moved.{name}", name], [f"new.{name}"]),
        helper.make_node("Sub", [grad, grad], [f"none.{name}"]),
        helper.make_node("Where", ["applies", f"none.{name}", grad], [f"new.gradient.{name}"]),
    ]


def _written(path, kind, nodes, inputs, outputs, about):
    constants = {"classes": np.int64(CLASSES), "zero_one": np.float32([0, 1])}
    constants |= {"last": np.int64([-1]), "first": np.int64([0])}
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        kind,
        [_value(n, s) for n, s in inputs.items()],
        [_value(n, s) for n, s in outputs.items()],
        [numpy_helper.from_array(np.asarray(x), n) for n, x in constants.items() if n in used],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    said = {"format": "lightning_da3", "format_version": 1, "kind": kind, **ABOUT, **about}
    said |= {"inputs": _ports(inputs), "outputs": _ports(outputs)}
    helper.set_model_props(model, {"lightning_da3": json.dumps(said)})
    save_model(model, str(path))
    if kind == "training":
        write_start(path.with_name(path.name + ".safetensors"))
    return path


def _value(name, shape):
    kind = TensorProto.INT64 if name == "targets" else TensorProto.FLOAT
    return helper.make_tensor_value_info(name, kind, shape)


def _ports(shapes):
    return [
        {"name": n, "shape": s, "dtype": "int64" if n == "targets" else "float32"}
        for n, s in shapes.items()
    ]
