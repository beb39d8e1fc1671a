from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from sepdeploy.bench.session import Session, open_session, random_input
from sepdeploy.errors import ToolError, UsageError


def mul_file(path: Path, shapes: list[list[int | str]], kind: int = TensorProto.FLOAT) -> Path:
    """An ONNX file that multiplies its inputs, or its only input with itself."""
    names = [f"x{i}" for i in range(len(shapes))]
    graph = helper.make_graph(
        [helper.make_node("Mul", [names[0], names[-1]], ["y"])],
        "mul",
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in zip(names, shapes, strict=True)],
        [helper.make_tensor_value_info("y", kind, None)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), str(path))
    return path


def check(session: Session, batch: np.ndarray, wanted: tuple[np.ndarray, ...], tolerance: float) -> None:
    assert session.input_shape == (1, *batch.shape[1:])
    outputs = session.predict(batch)
    assert [output.shape for output in outputs] == [output.shape for output in wanted]
    for output, want in zip(outputs, wanted, strict=True):
        assert output.dtype == np.float32
        np.testing.assert_allclose(output, want, atol=tolerance)
    session.set_random_input(0)
    session.run_once()
    np.testing.assert_array_equal(session.predict(batch)[0], outputs[0])
    fresh = session.reopen()
    assert (fresh.path, fresh.runtime, fresh.input_shape) == (session.path, session.runtime, session.input_shape)
    np.testing.assert_array_equal(fresh.predict(batch)[0], outputs[0])


def test_onnx(onnx_file: Path, batch: np.ndarray, wanted: tuple[np.ndarray, ...]) -> None:
    session = open_session(onnx_file)
    assert session.runtime.startswith("onnxruntime 1.")
    check(session, batch, wanted, 1e-5)


def test_float_tflite(tflite_file: Path, batch: np.ndarray, wanted: tuple[np.ndarray, ...]) -> None:
    session = open_session(tflite_file, threads=2, is_channels_last=True)
    assert session.runtime.startswith("ai-edge-litert 2.")
    check(session, batch, wanted, 1e-5)


def test_int8_tflite(int8_tflite_file: Path, batch: np.ndarray, wanted: tuple[np.ndarray, ...]) -> None:
    # Two steps of the output's scale: (max - min) / 255 with values up to 4
    check(open_session(int8_tflite_file, is_channels_last=True), batch, wanted, 0.06)


def test_tflite_as_the_file_is(tflite_file: Path, batch: np.ndarray, wanted: tuple[np.ndarray, ...]) -> None:
    session = open_session(tflite_file)
    assert session.input_shape == (1, 8, 6, 3)
    np.testing.assert_allclose(
        session.predict(batch.transpose(0, 2, 3, 1))[0], wanted[0].transpose(0, 2, 3, 1), atol=1e-5
    )


def test_batch_that_does_not_fit(onnx_file: Path, batch: np.ndarray) -> None:
    session = open_session(onnx_file)
    for wrong in (batch[:0], batch[:, :2], batch[0]):
        with pytest.raises(UsageError, match=r"takes inputs of shape \(1, 3, 8, 6\), got"):
            session.predict(wrong)


def test_symbolic_batch_becomes_one(tmp_path: Path) -> None:
    session = open_session(mul_file(tmp_path / "net.onnx", [["N", 3]]))
    assert session.input_shape == (1, 3)
    np.testing.assert_array_equal(session.predict(np.full((4, 3), 3, np.float32))[0], np.full((4, 3), 9))


def test_larger_batch_of_the_file(tmp_path: Path) -> None:
    session = open_session(mul_file(tmp_path / "net.onnx", [[2, 3]]))
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    np.testing.assert_array_equal(session.predict(x)[0], x * x)
    with pytest.raises(UsageError, match=r"takes inputs of shape \(2, 3\)"):
        session.predict(x[:3])


def test_other_symbolic_dimensions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"dynamic shape .*fixed height and width"):
        open_session(mul_file(tmp_path / "net.onnx", [[1, 3, "H", "W"]]))


def test_several_inputs_can_be_timed_only(tmp_path: Path) -> None:
    session = open_session(mul_file(tmp_path / "net.onnx", [[1, 3], [1, 3]]))
    session.set_random_input(0)
    session.run_once()
    with pytest.raises(UsageError, match="has 2 inputs"):
        session.predict(np.zeros((1, 3), np.float32))


def test_integer_input_of_onnx_can_be_timed_only(tmp_path: Path) -> None:
    session = open_session(mul_file(tmp_path / "net.onnx", [[1, 3]], TensorProto.INT64))
    session.set_random_input(0)
    session.run_once()
    with pytest.raises(UsageError, match="takes int64"):
        session.predict(np.zeros((1, 3), np.float32))


def test_file_that_loads_but_cannot_run_is_a_tool_error(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Reshape", ["x", "shape"], ["y"])],
        "needs_a_batch_of_two",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3])],
        [helper.make_tensor("shape", TensorProto.INT64, [2], [2, 3])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, str(tmp_path / "net.onnx"))
    session = open_session(tmp_path / "net.onnx")
    with pytest.raises(ToolError, match=r"fails to run .*net\.onnx"):
        session.set_random_input(0)
    with pytest.raises(ToolError, match=r"fails to run .*net\.onnx"):
        session.predict(np.zeros((1, 3), np.float32))


@pytest.mark.parametrize("suffix", [".onnx", ".tflite"])
@pytest.mark.parametrize("content", [b"", b"garbage" * 100])
def test_damaged_files(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"net{suffix}"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="cannot load"):
        open_session(path)


@pytest.mark.parametrize("share", [0.2, 0.6, 0.99])
def test_truncated_files(onnx_file: Path, tflite_file: Path, tmp_path: Path, share: float) -> None:
    for file in (onnx_file, tflite_file):
        data = file.read_bytes()
        (tmp_path / file.name).write_bytes(data[: int(len(data) * share)])
        with pytest.raises(UsageError, match="cannot load"):
            open_session(tmp_path / file.name)


def test_files_of_other_kinds(tmp_path: Path, onnx_file: Path) -> None:
    with pytest.raises(UsageError, match=r"neither an \.onnx nor a \.tflite"):
        open_session(tmp_path / "net.pt")
    with pytest.raises(UsageError, match="does not exist"):
        open_session(tmp_path / "none.onnx")
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(UsageError, match="does not exist or is not a file"):
        open_session(tmp_path / "folder.onnx")
    with pytest.raises(UsageError, match="--threads must be at least 1, got 0"):
        open_session(onnx_file, threads=0)
    with pytest.raises(UsageError, match="keep the layout"):
        open_session(onnx_file, is_channels_last=True)


def test_missing_interpreter_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ai_edge_litert", "ai_edge_litert.interpreter", "tflite_runtime", "tflite_runtime.interpreter"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "net.tflite").touch()
    with pytest.raises(ToolError, match="pip install ai-edge-litert"):
        open_session(tmp_path / "net.tflite")


def test_random_inputs_by_type() -> None:
    rng = np.random.default_rng(0)
    int8 = random_input((1000,), np.dtype(np.int8), rng)
    assert (int8.dtype, int8.min(), int8.max()) == (np.int8, -128, 127)
    assert set(random_input((100,), np.dtype(np.int64), rng)) == {0, 1}
    assert random_input((100,), np.dtype(np.bool_), rng).dtype == np.bool_
    assert abs(random_input((1000,), np.dtype(np.float16), rng).std() - 1) < 0.1
