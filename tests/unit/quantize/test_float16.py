from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sepdeploy.bench.session import open_session
from sepdeploy.core.artifact import Format
from sepdeploy.errors import ToolError
from sepdeploy.quantize.float16 import computes_in_float16, convert_to_float16


def difference(source: Path, half: Path, images: np.ndarray, *, is_channels_last: bool) -> float:
    before, after = (
        open_session(path, is_channels_last=is_channels_last).predict(images)[0] for path in (source, half)
    )
    assert before.dtype == after.dtype == np.float32
    return float(np.abs(before - after).max() / np.abs(before).max())


def test_onnx(float_onnx: Path, validation: np.ndarray, tmp_path: Path) -> None:
    half = tmp_path / "half.onnx"
    convert_to_float16(float_onnx, half, Format.ONNX)
    assert 0 < difference(float_onnx, half, validation, is_channels_last=False) < 5e-3
    graph = onnx.load(str(half)).graph
    kinds = {constant.data_type for constant in graph.initializer if len(constant.dims) == 4}
    assert kinds == {TensorProto.FLOAT16}
    assert {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)} == {TensorProto.FLOAT}
    again = tmp_path / "again.onnx"
    convert_to_float16(float_onnx, again, Format.ONNX)
    assert again.read_bytes() == half.read_bytes()


def test_tflite(float_tflite: Path, validation: np.ndarray, tmp_path: Path) -> None:
    from ai_edge_litert.interpreter import Interpreter

    half = tmp_path / "half.tflite"
    convert_to_float16(float_tflite, half, Format.TFLITE)
    assert 0 < difference(float_tflite, half, validation, is_channels_last=True) < 5e-3
    details = Interpreter(str(half)).get_tensor_details()
    assert {np.dtype(each["dtype"]) for each in details if len(each["shape"]) == 4} == {
        np.dtype(np.float16),
        np.dtype(np.float32),
    }
    assert not computes_in_float16(half, Format.TFLITE)


def one_conv(path: Path, dtype: type) -> Path:
    """A file of one convolution, in `dtype` throughout."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"])],
        "conv",
        [helper.make_tensor_value_info("x", kind, (1, 4, 8, 8))],
        [helper.make_tensor_value_info("y", kind, (1, 4, 8, 8))],
        [numpy_helper.from_array(np.ones((4, 4, 1, 1), dtype), "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), str(path))
    return path


def test_what_this_machine_computes_in_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = one_conv(tmp_path / "half.onnx", np.float16)
    assert not computes_in_float16(one_conv(tmp_path / "float.onnx", np.float32), Format.ONNX)
    # As a processor with float16 kernels would leave the graph.
    monkeypatch.setattr("sepdeploy.quantize.float16.running_graph", lambda path: onnx.load(str(path)).graph)
    assert computes_in_float16(half, Format.ONNX)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad"
    path.write_bytes(b"garbage" * 50)
    for file_format in Format:
        with pytest.raises(ToolError, match="cannot be converted to float16"):
            convert_to_float16(path, tmp_path / "half", file_format)
    assert not (tmp_path / "half").exists()
