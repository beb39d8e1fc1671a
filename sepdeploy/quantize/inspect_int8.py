"""Reads from a deployable file which operators compute in int8 and which stayed in floating point."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sepdeploy.core.artifact import Format
from sepdeploy.errors import ToolError, UsageError

if TYPE_CHECKING:
    import onnx

__all__ = ["OnnxView", "float_ops_of_onnx", "float_ops_of_tflite", "require_int8_convs"]

_CONVS = {
    Format.ONNX: frozenset({"Conv", "ConvTranspose"}),
    Format.TFLITE: frozenset({"CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV"}),
}

# These change no value and move none, so they cost the same in every type.
_ONNX_FREE = frozenset({"Constant", "Flatten", "Identity", "Reshape", "Shape", "Squeeze", "Unsqueeze"})
_TFLITE_FREE = frozenset({"EXPAND_DIMS", "RESHAPE", "SHAPE", "SQUEEZE"})

_ONNX_BOUNDARY = frozenset({"QuantizeLinear", "DequantizeLinear"})
_TFLITE_BOUNDARY = frozenset({"QUANTIZE", "DEQUANTIZE"})

# What onnxruntime computes on 8-bit integers between a DequantizeLinear and a QuantizeLinear; it runs every other
# operator in float32 there, between two conversions.
_ONNX_INT8_KERNELS = frozenset(
    {
        *("Add", "AveragePool", "Concat", "Conv", "Gemm", "GlobalAveragePool", "LeakyRelu", "MatMul", "Mul", "Relu"),
        *("Sigmoid", "Softmax"),
        *("DepthToSpace", "Expand", "Gather", "MaxPool", "ReduceMax", "Resize", "Slice", "Split", "Tile", "Transpose"),
    }
)

# Inputs after the first are not data in these: sizes, scales, bounds.
_ONNX_ONE_DATA_INPUT = frozenset({"Clip", "Resize"})

# A runtime folds these into the int8 operator before them, through the clamp to the output's range.
_ONNX_ACTIVATIONS = frozenset({"Relu", "Clip"})


def float_ops_of_onnx(path: Path) -> tuple[str, ...]:
    """Operators of an ONNX file that compute in floating point, as 'Softmax x1', sorted by name.

    In QDQ form an operator is int8 if every floating-point input comes from a DequantizeLinear, every output goes to a
    QuantizeLinear, with a Relu or a Clip between at most, and onnxruntime has an int8 kernel for it. Quantize and
    dequantize operators and reshapes are not listed.

    Raises:
        UsageError: if the file cannot be read as ONNX.
    """
    return _counted(op_type for op_type, is_int8 in _onnx_ops(path) if not is_int8)


def float_ops_of_tflite(path: Path) -> tuple[str, ...]:
    """Operators of a TFLite file with a floating-point input or output, as 'SOFTMAX x1', sorted by name.

    Quantize and dequantize operators and reshapes are not listed.

    Raises:
        UsageError: if the file cannot be read as TFLite.
    """
    return _counted(op_type for op_type, is_int8 in _tflite_ops(path) if not is_int8)


def require_int8_convs(path: Path, format: Format) -> None:
    """Fail if the file at `path` has convolutions and none of them computes in int8.

    Raises:
        ToolError: if all convolutions are still in floating point.
        UsageError: if the file cannot be read.
    """
    ops = _onnx_ops(path) if format is Format.ONNX else _tflite_ops(path)
    convs = [is_int8 for op_type, is_int8 in ops if op_type in _CONVS[format]]
    if convs and not any(convs):
        raise ToolError(
            f"the quantizer left all {len(convs)} convolutions in floating point: its output is no int8 network; "
            "leave int8 out with --precisions float32"
        )


def _counted(op_types: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{op_type} x{count}" for op_type, count in sorted(Counter(op_types).items()))


def _onnx_ops(path: Path) -> list[tuple[str, bool]]:
    """(operator, whether it computes in int8) for each operator of the file that computes."""
    import onnx

    try:
        graph = onnx.shape_inference.infer_shapes(onnx.load(str(path))).graph
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # protobuf and the shape inference raise types of their own
        raise UsageError(f"{path} is not a valid ONNX file") from error
    if not graph.node:
        raise UsageError(f"{path} is not a valid ONNX file: it holds no operator")
    view = OnnxView(graph)
    return [
        (node.op_type, view.is_int8(node))
        for node in graph.node
        if node.op_type not in _ONNX_BOUNDARY | _ONNX_FREE and view.computes_on_floats(node)
    ]


class OnnxView:
    """Who makes and who reads each tensor of a graph."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        from onnx import TensorProto

        floats = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}
        values = (*graph.input, *graph.value_info, *graph.output)
        self._types = {value.name: value.type.tensor_type.elem_type for value in values}
        self._types.update({initializer.name: initializer.data_type for initializer in graph.initializer})
        self._floats = {name for name, dtype in self._types.items() if dtype in floats}
        self._int8 = {name for name, dtype in self._types.items() if dtype in {TensorProto.INT8, TensorProto.UINT8}}
        self._int32 = {name for name, dtype in self._types.items() if dtype == TensorProto.INT32}
        self._makers = {output: node for node in graph.node for output in node.output}
        self._outputs = {output.name for output in graph.output}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)

    def computes_on_floats(self, node: onnx.NodeProto) -> bool:
        """Whether a floating-point tensor goes into or comes out of `node`: shapes are computed on integers."""
        return any(name in self._floats for name in (*node.input, *node.output))

    def is_int8(self, node: onnx.NodeProto) -> bool:
        """Whether the runtime may compute `node` on 8-bit integers."""
        if node.op_type in _ONNX_ACTIVATIONS and self._is_fused_activation(node):
            return True
        if node.op_type not in _ONNX_INT8_KERNELS:
            return False
        inputs = node.input[:1] if node.op_type in _ONNX_ONE_DATA_INPUT else node.input
        has_int8_inputs = all(self.is_dequantized(name) for name in inputs if name in self._floats)
        return has_int8_inputs and all(self.is_quantized(name) for name in node.output if name in self._floats)

    def _is_fused_activation(self, node: onnx.NodeProto) -> bool:
        maker = self._makers.get(node.input[0])
        return maker is not None and maker.op_type not in _ONNX_BOUNDARY | _ONNX_ACTIVATIONS and self.is_int8(maker)

    def is_dequantized(self, name: str) -> bool:
        """Whether a tensor is an 8-bit one, or a bias of 32 bits, read through a DequantizeLinear."""
        maker = self._makers.get(name)
        if maker is None or maker.op_type != "DequantizeLinear":
            return False
        return maker.input[0] in self._int8 or maker.input[0] in self._int32  # biases are int32

    def is_quantized(self, name: str) -> bool:
        """Whether all that read a tensor, behind its activation, read it in 8 bits."""
        readers = self._readers.get(name, [])
        if name in self._outputs or not readers:
            return False
        if len(readers) == 1 and readers[0].op_type in _ONNX_ACTIVATIONS:
            name = readers[0].output[0]
            readers = self._readers.get(name, [])
        return bool(readers) and all(
            reader.op_type == "QuantizeLinear" and reader.output[0] in self._int8 for reader in readers
        )


def _tflite_ops(path: Path) -> list[tuple[str, bool]]:
    """(operator, whether it computes without floating point) for each operator of the file that computes."""
    from ai_edge_litert import schema_py_generated as schema

    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    if data[4:8] != b"TFL3":
        raise UsageError(f"{path} is not a valid TFLite file")
    op_names = {code: name for name, code in vars(schema.BuiltinOperator).items() if not name.startswith("_")}
    floats = {schema.TensorType.FLOAT16, schema.TensorType.FLOAT32, schema.TensorType.FLOAT64}
    try:
        model = schema.Model.GetRootAs(data, 0)
        ops = [
            op
            for i in range(model.SubgraphsLength())
            for op in _subgraph_ops(model, model.Subgraphs(i), op_names, floats)
        ]
    except Exception as error:  # offsets that point outside of the buffer
        raise UsageError(f"{path} is not a valid TFLite file") from error
    return [(op_type, is_int8) for op_type, is_int8 in ops if op_type not in _TFLITE_BOUNDARY | _TFLITE_FREE]


def _subgraph_ops(model: Any, graph: Any, op_names: dict[int, str], floats: set[int]) -> list[tuple[str, bool]]:
    """(name, whether no input or output is floating point) of each operator of one subgraph."""
    types = [graph.Tensors(i).Type() for i in range(graph.TensorsLength())]
    ops = []
    for i in range(graph.OperatorsLength()):
        op = graph.Operators(i)
        code = model.OperatorCodes(op.OpcodeIndex())
        tensors = [op.Inputs(k) for k in range(op.InputsLength())] + [op.Outputs(k) for k in range(op.OutputsLength())]
        has_float = any(types[tensor] in floats for tensor in tensors if tensor >= 0)  # -1: an input left out
        ops.append((op_names[max(code.BuiltinCode(), code.DeprecatedBuiltinCode())], not has_float))
    return ops
