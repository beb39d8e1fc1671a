"""Which multiply-accumulates of an int8 file are computed in int8, and why the others are not."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sepdeploy.core.int8_proof import FloatLayer, FloatReason, Int8Proof
from sepdeploy.errors import UsageError
from sepdeploy.quantize.inspect_int8 import OnnxView
from sepdeploy.quantize.layer_names import onnx_layer_name, tflite_layer_name
from sepdeploy.quantize.running_graph import running_graph

if TYPE_CHECKING:
    import onnx

__all__ = [
    "ONNX_LAYERS",
    "TFLITE_LAYERS",
    "TfliteLayer",
    "int8_share_of_onnx",
    "int8_share_of_tflite",
    "tflite_layers",
    "weights_of_onnx",
]

_Shape = Sequence[int]

ONNX_LAYERS: Mapping[str, Callable[[_Shape, _Shape, _Shape], int]] = MappingProxyType(
    {
        "Conv": lambda _x, w, y: math.prod(y) * math.prod(w[1:]),
        "ConvTranspose": lambda x, w, _y: math.prod(x) * math.prod(w[1:]),
        "Gemm": lambda x, _w, y: math.prod(x) * math.prod(y) // y[0],
        "MatMul": lambda x, _w, y: math.prod(y) * x[-1],
    }
)
"""Operator -> multiply-accumulates from the shapes of its data, its weights (or other factor) and its output."""

TFLITE_LAYERS: Mapping[str, Callable[[_Shape, _Shape, _Shape], int]] = MappingProxyType(
    {
        "CONV_2D": lambda _x, w, y: math.prod(y) * math.prod(w[1:]),
        "DEPTHWISE_CONV_2D": lambda _x, w, y: math.prod(y) * w[1] * w[2],
        "TRANSPOSE_CONV": lambda x, w, _y: math.prod(x) * math.prod(w[:3]),
        "FULLY_CONNECTED": lambda _x, w, y: math.prod(y) * w[-1],
        "BATCH_MATMUL": lambda x, _w, y: math.prod(x) * y[-1],
    }
)
"""The same; weights are (out, H, W, in), of a depthwise convolution (1, H, W, out), of a matrix product (out, in)."""

# What onnxruntime puts in the place of an operator and the conversions around it, and computes on integers.
_ONNX_INT8 = frozenset(
    {
        *("QLinearConv", "QLinearMatMul", "QGemm", "ConvInteger", "MatMulInteger"),
        *("MatMulIntegerToFloat", "DynamicQuantizeMatMul"),
    }
)
_NO_ONNX_KERNEL = frozenset({"ConvTranspose"})


def int8_share_of_onnx(path: Path) -> Int8Proof:
    """What an int8 ONNX file computes in int8: shapes from the file, verdicts from the graph that onnxruntime runs.

    onnxruntime's optimizer replaces an operator between dequantize and quantize operators by an integer one where it
    has one for it on this processor. The graph that comes out of it is what is looked at.

    Raises:
        UsageError: if onnxruntime cannot load the file.
    """
    import onnx

    running = {node.name: node.op_type for node in running_graph(path).node}
    graph = onnx.shape_inference.infer_shapes(onnx.load(str(path))).graph
    view = OnnxView(graph)
    weights = weights_of_onnx(graph)
    shapes = _onnx_shapes(graph)
    macs, floats = 0, []
    for node in graph.node:
        if node.op_type not in ONNX_LAYERS:
            continue
        count = ONNX_LAYERS[node.op_type](*(shapes[name] for name in (*node.input[:2], node.output[0])))
        macs += count
        if running.get(node.name) not in _ONNX_INT8:
            name = onnx_layer_name(node.name, weights[node.output[0]])
            floats.append(FloatLayer(name, node.op_type, count, _onnx_reason(node, view)))
    return _proof(macs, floats)


def weights_of_onnx(graph: onnx.GraphProto) -> dict[str, str]:
    """Output of each operator with multiply-accumulates -> name of its weights, before they were dequantized."""
    dequantized = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    return {
        node.output[0]: dequantized.get(node.input[1], node.input[1])
        for node in graph.node
        if node.op_type in ONNX_LAYERS
    }


def _onnx_shapes(graph: onnx.GraphProto) -> dict[str, tuple[int, ...]]:
    values = (*graph.input, *graph.value_info, *graph.output)
    shapes = {value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim) for value in values}
    return shapes | {constant.name: tuple(constant.dims) for constant in graph.initializer}


def _onnx_reason(node: onnx.NodeProto, view: OnnxView) -> FloatReason:
    has_int8_data, has_int8_weights = (view.is_dequantized(name) for name in node.input[:2])
    if has_int8_data and has_int8_weights and node.op_type in _NO_ONNX_KERNEL:
        return FloatReason.NO_KERNEL
    if not has_int8_weights:
        return FloatReason.WEIGHTS
    if not has_int8_data:
        return FloatReason.WEIGHTS_ONLY
    return FloatReason.NOT_FUSED if view.is_quantized(node.output[0]) else FloatReason.OUTPUT


def int8_share_of_tflite(path: Path) -> Int8Proof:
    """What an int8 TFLite file computes in int8: an operator computes in the types of its tensors.

    Raises:
        UsageError: if the file cannot be read.
    """
    from ai_edge_litert import schema_py_generated as schema

    eight_bits = {schema.TensorType.INT8, schema.TensorType.UINT8}
    model = _read_tflite(path)
    macs, floats = 0, []
    for graph in model.subgraphs:
        makers = {output: operator for operator in graph.operators for output in operator.outputs}
        for place, operator in enumerate(graph.operators):
            op_type = _op_type(model, operator)
            if op_type not in TFLITE_LAYERS:
                continue
            data, weights = _tflite_operands(op_type, operator)
            x, w, y = (graph.tensors[i] for i in (data, weights, operator.outputs[0]))
            count = TFLITE_LAYERS[op_type](*([int(size) for size in tensor.shape] for tensor in (x, w, y)))
            macs += count
            is_int8 = [tensor.type in eight_bits for tensor in (x, w, y)]
            if not all(is_int8):
                maker = makers.get(weights)
                has_int8_weights = maker is not None and graph.tensors[maker.inputs[0]].type in eight_bits
                reason = _tflite_reason(is_int8, has_int8_weights=has_int8_weights)
                floats.append(
                    FloatLayer(tflite_layer_name([y.name.decode(), w.name.decode()], place), op_type, count, reason)
                )
    return _proof(macs, floats)


@dataclass(frozen=True, slots=True)
class TfliteLayer:
    """An operator of a TFLite file with multiply-accumulates.

    Attributes:
        name: What the network calls it.
        op_type: The operator.
        inputs: Tensors of its data; weights are not among them.
        output: Tensor that it returns.
    """

    name: str
    op_type: str
    inputs: tuple[int, ...]
    output: int


def tflite_layers(path: Path) -> list[TfliteLayer]:
    """The operators with multiply-accumulates of the main subgraph, in order.

    Raises:
        UsageError: if the file cannot be read.
    """
    model = _read_tflite(path)
    graph = model.subgraphs[0]
    computed = {output for operator in graph.operators for output in operator.outputs} | set(graph.inputs)
    layers = []
    for place, operator in enumerate(graph.operators):
        op_type = _op_type(model, operator)
        if op_type in TFLITE_LAYERS:
            data, weights = _tflite_operands(op_type, operator)
            inputs = (data, weights) if op_type == "BATCH_MATMUL" and weights in computed else (data,)
            output = int(operator.outputs[0])
            name = tflite_layer_name([graph.tensors[i].name.decode() for i in (output, weights)], place)
            layers.append(TfliteLayer(name, op_type, inputs, output))
    return layers


def _read_tflite(path: Path) -> Any:
    from ai_edge_litert.tools import flatbuffer_utils

    try:
        return flatbuffer_utils.read_model(str(path))
    except Exception as error:  # offsets that point outside of the buffer
        raise UsageError(f"{path} is not a valid TFLite file") from error


def _op_type(model: Any, operator: Any) -> str:
    from ai_edge_litert.tools import flatbuffer_utils

    name: str = flatbuffer_utils.opcode_to_name(model, operator.opcodeIndex)
    return name


def _tflite_operands(op_type: str, operator: Any) -> tuple[int, int]:
    """Tensors of the data and of the weights, or of the two factors."""
    first, second = (2, 1) if op_type == "TRANSPOSE_CONV" else (0, 1)  # its first input is a shape
    return int(operator.inputs[first]), int(operator.inputs[second])


def _tflite_reason(is_int8: Sequence[bool], *, has_int8_weights: bool) -> FloatReason:
    x, w, _ = is_int8
    if not w:
        return FloatReason.WEIGHTS_ONLY if has_int8_weights else FloatReason.WEIGHTS
    return FloatReason.OUTPUT if x else FloatReason.INPUT


def _proof(macs: int, floats: list[FloatLayer]) -> Int8Proof:
    return Int8Proof(macs, macs - sum(each.macs for each in floats), tuple(sorted(floats, key=lambda f: -f.macs)))
