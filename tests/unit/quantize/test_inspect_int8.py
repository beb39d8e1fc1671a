from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from sepdeploy.core.artifact import Format
from sepdeploy.errors import ToolError, UsageError
from sepdeploy.quantize.inspect_int8 import float_ops_of_onnx, float_ops_of_tflite, require_int8_convs

KERNEL = np.ones((4, 4, 3, 3), np.int8)
IMAGE = (1, 4, 8, 8)


def one_op(path: Path, op_type: str, constants: tuple[np.ndarray | str, ...] = (), **options: Any) -> Path:
    """A file of one operator with dequantized inputs and a quantized output."""
    inputs = options.pop("inputs", 1)
    initializers = [numpy_helper.from_array(np.float32(0.1), "s"), numpy_helper.from_array(np.uint8(0), "z")]
    nodes = [helper.make_node("DequantizeLinear", [f"x{i}", "s", "z"], [f"d{i}"]) for i in range(inputs)]
    names = [f"d{i}" for i in range(inputs)]
    for i, constant in enumerate(constants):
        if isinstance(constant, str):
            names.append(constant)
            continue
        initializers.append(numpy_helper.from_array(constant, f"c{i}"))
        names.append(f"c{i}")
        if constant.dtype == np.int8:
            initializers.append(numpy_helper.from_array(np.int8(0), f"z{i}"))
            nodes.append(helper.make_node("DequantizeLinear", [f"c{i}", "s", f"z{i}"], [f"w{i}"]))
            names[-1] = f"w{i}"
    nodes.append(helper.make_node(op_type, names, ["y"], **options))
    nodes.append(helper.make_node("QuantizeLinear", ["y", "s", "z"], ["q"]))
    graph = helper.make_graph(
        nodes,
        "one_op",
        [helper.make_tensor_value_info(f"x{i}", TensorProto.UINT8, IMAGE) for i in range(inputs)],
        [helper.make_tensor_value_info("q", TensorProto.UINT8, None)],
        initializers,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), str(path))
    return path


@pytest.mark.parametrize(
    ("op_type", "constants", "options"),
    [
        ("Conv", (KERNEL,), {}),
        ("ConvTranspose", (KERNEL,), {}),
        ("MatMul", (np.ones((8, 3), np.int8),), {}),
        ("Add", (), {"inputs": 2}),
        ("Mul", (), {"inputs": 2}),
        ("Sub", (), {"inputs": 2}),
        ("Div", (), {"inputs": 2}),
        ("Concat", (), {"inputs": 2, "axis": 1}),
        ("AveragePool", (), {"kernel_shape": [2, 2]}),
        ("GlobalAveragePool", (), {}),
        ("MaxPool", (), {"kernel_shape": [2, 2]}),
        ("ReduceMean", (np.array([2, 3]),), {}),
        ("ReduceMax", (np.array([2, 3]),), {}),
        ("Relu", (), {}),
        ("Clip", (np.float32(0), np.float32(6)), {}),
        ("LeakyRelu", (), {}),
        ("Sigmoid", (), {}),
        ("HardSigmoid", (), {}),
        ("HardSwish", (), {}),
        ("Tanh", (), {}),
        ("Softmax", (), {}),
        ("Transpose", (), {"perm": [0, 2, 3, 1]}),
        ("Resize", ("", np.array([1, 1, 2, 2], np.float32)), {}),
        ("Slice", (np.array([0]), np.array([2]), np.array([1])), {}),
        ("Gather", (np.array([0, 1]),), {"axis": 1}),
        ("Expand", (np.array([2, 4, 8, 8]),), {}),
        ("Tile", (np.array([1, 2, 1, 1]),), {}),
        ("DepthToSpace", (), {"blocksize": 2}),
        ("SpaceToDepth", (), {"blocksize": 2}),
        ("Pad", (np.array([0, 0, 1, 1, 0, 0, 1, 1]),), {}),
    ],
)
def test_verdict_is_that_of_onnxruntime(tmp_path: Path, op_type: str, constants: tuple[Any, ...], options: Any) -> None:
    path = one_op(tmp_path / "op.onnx", op_type, constants, **options)
    session_options = onnxruntime.SessionOptions()
    session_options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    session_options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    session_options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), session_options, providers=["CPUExecutionProvider"])
    optimized = {node.op_type for node in onnx.load(str(tmp_path / "optimized.onnx")).graph.node}
    assert float_ops_of_onnx(path) == ((f"{op_type} x1",) if "DequantizeLinear" in optimized else ())


def conv_file(path: Path, *, after: tuple[str, ...] = (), is_weight_float: bool = False) -> Path:
    """DequantizeLinear, Conv, the operators `after`, QuantizeLinear."""
    one_op(path, "Conv", (KERNEL,))
    file = onnx.load(str(path))
    nodes = {node.op_type: node for node in file.graph.node}
    for i, op_type in enumerate(after):
        source = nodes["QuantizeLinear"].input[0]
        file.graph.node.insert(len(file.graph.node) - 1, helper.make_node(op_type, [source], [f"a{i}"]))
        file.graph.node[-1].input[0] = f"a{i}"
        nodes["QuantizeLinear"] = file.graph.node[-1]
    if is_weight_float:
        file.graph.initializer.append(numpy_helper.from_array(KERNEL.astype(np.float32), "float_kernel"))
        nodes["Conv"].input[1] = "float_kernel"
    onnx.save(file, str(path))
    return path


def test_relu_between_conv_and_quantize_is_part_of_the_conv(tmp_path: Path) -> None:
    assert float_ops_of_onnx(conv_file(tmp_path / "relu.onnx", after=("Relu",))) == ()
    assert float_ops_of_onnx(conv_file(tmp_path / "tanh.onnx", after=("Tanh",))) == ("Conv x1", "Tanh x1")


def test_conv_with_a_float_kernel_is_float(tmp_path: Path) -> None:
    path = conv_file(tmp_path / "net.onnx", is_weight_float=True)
    assert float_ops_of_onnx(path) == ("Conv x1",)
    with pytest.raises(ToolError, match="all 1 convolutions in floating point"):
        require_int8_convs(path, Format.ONNX)


def test_int8_convs_and_networks_without_convs_pass(tmp_path: Path) -> None:
    require_int8_convs(conv_file(tmp_path / "conv.onnx"), Format.ONNX)
    require_int8_convs(one_op(tmp_path / "tanh.onnx", "Tanh"), Format.ONNX)


def test_float_file_is_refused(float_onnx: Path, float_tflite: Path) -> None:
    with pytest.raises(ToolError, match="all 4 convolutions"):
        require_int8_convs(float_onnx, Format.ONNX)
    with pytest.raises(ToolError, match="all 4 convolutions"):
        require_int8_convs(float_tflite, Format.TFLITE)


@pytest.mark.parametrize("content", [b"", b"garbage" * 50, b"\x1c\x00\x00\x00TFL3" + b"\xff" * 40])
def test_damaged_files_are_usage_errors(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="not a valid TFLite"):
        float_ops_of_tflite(path)
    with pytest.raises(UsageError, match="not a valid ONNX"):
        float_ops_of_onnx(path)


def test_missing_files_are_usage_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        float_ops_of_tflite(tmp_path / "none")
    with pytest.raises(UsageError, match="cannot read"):
        float_ops_of_onnx(tmp_path / "none")
