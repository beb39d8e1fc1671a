from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from sepdeploy.bench.onnxruntime import OrtSession
from sepdeploy.errors import ToolError, UsageError
from sepdeploy.export.onnx import export_onnx
from sepdeploy.quantize.inspect_int8 import float_ops_of_onnx
from sepdeploy.quantize.onnx_qdq import quantize_onnx


def single(images: np.ndarray) -> Iterator[np.ndarray]:
    return (images[i : i + 1] for i in range(len(images)))


@pytest.fixture(scope="module")
def int8_onnx(float_onnx: Path, calibration: np.ndarray) -> Path:
    path = float_onnx.with_name("int8.onnx")
    quantize_onnx(float_onnx, path, single(calibration))
    return path


def test_outputs_stay_close(net: nn.Module, int8_onnx: Path, validation: np.ndarray) -> None:
    (output,) = OrtSession(int8_onnx).predict(validation)
    with torch.no_grad():
        wanted = net(torch.from_numpy(validation)).numpy()
    assert 10 * np.log10(np.sum(wanted**2) / np.sum((output - wanted) ** 2)) > 20


def test_weights_are_int8_per_channel_and_activations_uint8(int8_onnx: Path) -> None:
    graph = onnx.load(str(int8_onnx)).graph
    constants = {initializer.name: onnx.numpy_helper.to_array(initializer) for initializer in graph.initializer}
    makers = {node.output[0]: node for node in graph.node}
    convs = [node for node in graph.node if node.op_type == "Conv"]
    assert len(convs) == 4
    for conv in convs:
        weight = makers[conv.input[1]]
        kernel, scales, zero_points = (constants[name] for name in weight.input)
        assert kernel.dtype == np.int8
        assert scales.shape == (kernel.shape[0],)
        assert not zero_points.any()
        activation = makers[conv.input[0]]
        assert constants[activation.input[2]].dtype == np.uint8


@pytest.mark.parametrize(
    ("layer", "in_float"),
    [
        (nn.ConvTranspose2d(8, 8, 2, groups=2), ("ConvTranspose x1",)),
        (nn.LayerNorm([8, 14, 10]), ("LayerNormalization x1",)),
        (nn.AvgPool2d(3, 2, ceil_mode=True), ()),
    ],
    ids=["grouped transposed convolution", "norm of several axes", "window that ends beyond the image"],
)
def test_layers_that_onnxruntime_gets_wrong_stay_close(
    layer: nn.Module, in_float: tuple[str, ...], calibration: np.ndarray, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), layer, nn.Conv2d(8, 4, 1)).eval()
    images = torch.from_numpy(calibration)
    export_onnx(net, images[:1], tmp_path / "net.onnx")
    quantize_onnx(tmp_path / "net.onnx", tmp_path / "int8.onnx", single(calibration))
    assert float_ops_of_onnx(tmp_path / "int8.onnx") == in_float
    (output,) = OrtSession(tmp_path / "int8.onnx").predict(calibration)
    wanted = net(images).detach().numpy()
    assert 10 * np.log10(np.sum(wanted**2) / np.sum((output - wanted) ** 2)) > 25


def test_onnxruntime_runs_every_convolution_in_int8(int8_onnx: Path, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(str(int8_onnx), options, providers=["CPUExecutionProvider"])
    op_types = [node.op_type for node in onnx.load(str(tmp_path / "optimized.onnx")).graph.node]
    assert op_types.count("QLinearConv") == 4
    assert "Conv" not in op_types
    assert float_ops_of_onnx(int8_onnx) == ()


def test_file_passes_the_full_check_and_declares_no_foreign_operators(int8_onnx: Path) -> None:
    file = onnx.load(str(int8_onnx))
    onnx.checker.check_model(file, full_check=True)
    assert [opset.domain for opset in file.opset_import] == [""]


def test_same_images_give_same_bytes(int8_onnx: Path, float_onnx: Path, calibration: np.ndarray) -> None:
    again = float_onnx.with_name("again.onnx")
    quantize_onnx(float_onnx, again, single(calibration))
    assert again.read_bytes() == int8_onnx.read_bytes()
    assert b"tmp" not in again.read_bytes()


def test_ranges_span_all_images_not_only_the_last(float_onnx: Path, calibration: np.ndarray, tmp_path: Path) -> None:
    def input_scale(images: np.ndarray) -> float:
        quantize_onnx(float_onnx, tmp_path / "int8.onnx", single(images))
        graph = onnx.load(str(tmp_path / "int8.onnx")).graph
        first = next(node for node in graph.node if node.op_type == "QuantizeLinear" and node.input[0] == "input")
        (scale,) = [i for i in graph.initializer if i.name == first.input[1]]
        return float(onnx.numpy_helper.to_array(scale))

    spread = np.concatenate([calibration[:1] * 0 + 5, calibration[:1] * 0 - 3, calibration[:1] * 0])
    assert input_scale(spread) == pytest.approx(8 / 255, rel=1e-5)


def test_memory_does_not_grow_with_the_images(float_onnx: Path, calibration: np.ndarray, tmp_path: Path) -> None:
    def peak(count: int) -> int:
        tracemalloc.start()
        try:
            quantize_onnx(float_onnx, tmp_path / "int8.onnx", (calibration[:1] for _ in range(count)))
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(1)  # imports
    assert peak(120) < peak(4) + 50_000  # 120 images take 270 kB, and their ranges more


def test_prints_nothing(
    float_onnx: Path, calibration: np.ndarray, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    quantize_onnx(float_onnx, tmp_path / "int8.onnx", single(calibration[:2]))
    assert capfd.readouterr() == ("", "")


def test_no_images_is_a_usage_error(float_onnx: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there are none"):
        quantize_onnx(float_onnx, tmp_path / "int8.onnx", [])
    assert not (tmp_path / "int8.onnx").exists()


def test_images_that_do_not_fit_are_named(float_onnx: Path, calibration: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"image 1 has shape \(1, 3, 16, 11\), the network takes \(1, 3, 16, 12\)"):
        quantize_onnx(float_onnx, tmp_path / "int8.onnx", [calibration[:1], calibration[:1, :, :, 1:]])
    with pytest.raises(UsageError, match="image 0 holds NaN"):
        quantize_onnx(float_onnx, tmp_path / "int8.onnx", [calibration[:1] * np.nan])


def test_damaged_file_is_a_tool_error(calibration: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"not a network")
    with pytest.raises(ToolError, match=r"could not quantize .*bad\.onnx"):
        quantize_onnx(tmp_path / "bad.onnx", tmp_path / "int8.onnx", single(calibration))
