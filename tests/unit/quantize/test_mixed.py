"""Files with some layers back in float: only those, with their activations, and everything else as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from sepdeploy.bench.session import open_session
from sepdeploy.core.int8_proof import FloatReason, Int8Proof
from sepdeploy.core.mixed import Arithmetic
from sepdeploy.export.tflite import export_tflite
from sepdeploy.quantize.int8_share import int8_share_of_onnx, int8_share_of_tflite
from sepdeploy.quantize.layer_sqnr import layer_sqnr_of_onnx, layer_sqnr_of_tflite
from sepdeploy.quantize.mixed_onnx import mix_onnx
from sepdeploy.quantize.mixed_tflite import mix_tflite
from sepdeploy.quantize.onnx_qdq import quantize_onnx
from sepdeploy.quantize.tflite_int8 import quantize_tflite

FLOAT, WEIGHTS = Arithmetic.FLOAT32, Arithmetic.WEIGHTS_ONLY
Case = tuple[Path, Path, Callable[..., frozenset[str]], Callable[[Path], Int8Proof], bool]


@pytest.fixture(scope="module", params=["onnx", "tflite"])
def case(request: pytest.FixtureRequest, calibration: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """The float file, the int8 file, what mixes them, what reads their share of int8, and the layout."""
    source: Path = request.getfixturevalue(f"float_{request.param}")
    int8 = tmp_path_factory.mktemp("mixed") / source.name
    images = np.split(calibration, len(calibration))
    if request.param == "onnx":
        quantize_onnx(source, int8, images)
        return source, int8, mix_onnx, int8_share_of_onnx, False
    quantize_tflite(source, int8, [image.transpose(0, 2, 3, 1) for image in images])
    return source, int8, mix_tflite, int8_share_of_tflite, True


def outputs(path: Path, images: np.ndarray, *, is_channels_last: bool) -> np.ndarray:
    return open_session(path, is_channels_last=is_channels_last).predict(images)[0].astype(np.float64)


def sqnr(source: Path, path: Path, images: np.ndarray, *, is_channels_last: bool) -> float:
    expected, found = (outputs(each, images, is_channels_last=is_channels_last) for each in (source, path))
    return float(10 * np.log10((expected**2).sum() / ((expected - found) ** 2).sum()))


def test_without_any_layer_nothing_changes(case: Case, validation: np.ndarray, tmp_path: Path) -> None:
    source, int8, mix, share, is_channels_last = case
    path = tmp_path / source.name
    assert mix(source, int8, path, {}) == frozenset()
    before, after = (outputs(each, validation, is_channels_last=is_channels_last) for each in (int8, path))
    np.testing.assert_array_equal(after, before)
    assert share(path).ratio == 1


@pytest.mark.parametrize(("arithmetic", "reason"), [(FLOAT, FloatReason.WEIGHTS), (WEIGHTS, FloatReason.WEIGHTS_ONLY)])
def test_only_what_is_named_is_in_float(
    case: Case, validation: np.ndarray, tmp_path: Path, arithmetic: Arithmetic, reason: FloatReason
) -> None:
    source, int8, mix, share, is_channels_last = case
    path = tmp_path / source.name
    assert mix(source, int8, path, {"branch": arithmetic, "nowhere": FLOAT}) == {"nowhere"}
    found = [(layer.name, layer.reason) for layer in share(path).float_layers]
    assert sorted(found, key=lambda each: each[0]) == [
        ("branch.0", reason),
        ("branch.3", reason),
    ]
    images = np.split(validation[:2], 2)
    if is_channels_last:
        layers = layer_sqnr_of_tflite(source, path, [image.transpose(0, 2, 3, 1) for image in images])
    else:
        layers = layer_sqnr_of_onnx(source, path, images)
    assert [layer.name for layer in layers] == ["stem.0", "branch.0", "branch.3", "down.0", "head"]
    assert all(layer.sqnr_db is not None and layer.sqnr_db > 20 for layer in layers)


def test_all_in_float_is_the_float_file_but_for_its_ends(case: Case, validation: np.ndarray, tmp_path: Path) -> None:
    source, int8, mix, share, is_channels_last = case
    path = tmp_path / source.name
    mix(source, int8, path, {"": FLOAT})
    if is_channels_last:
        before, after = (open_session(each)._inputs + open_session(each)._outputs for each in (int8, path))
        kinds = [[(each["dtype"], each["quantization"]) for each in ends] for ends in (before, after)]
        assert kinds[0] == kinds[1]
    assert share(path).int8_macs == 0
    mixed, quantized = (sqnr(source, each, validation, is_channels_last=is_channels_last) for each in (path, int8))
    # Input and output have 8 bits still; a ReLU that got lost would cost tens of decibels.
    assert mixed > quantized + 2


class Joined(nn.Module):
    """A layer that a convolution and a concatenation read: in int8 in two scales, in float in that of the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(16, 4, 1)
        nn.init.normal_(self.second.bias, std=3.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.last(torch.cat([x, 8 * self.second(x).relu()], 1)).mean((2, 3))


def test_biases_follow_the_scale_that_a_float_layer_is_quantized_in(
    calibration: np.ndarray, validation: np.ndarray, tmp_path: Path
) -> None:
    pytest.importorskip("litert_torch", reason="needs sepdeploy[tflite]")
    torch.manual_seed(0)
    source, int8, path = (tmp_path / name for name in ("net.tflite", "int8.tflite", "mixed.tflite"))
    export_tflite(Joined().eval(), torch.from_numpy(calibration[:1]), source, is_channels_last=True)
    quantize_tflite(source, int8, [image.transpose(0, 2, 3, 1) for image in np.split(calibration, len(calibration))])
    assert mix_tflite(source, int8, path, {"first": FLOAT}) == frozenset()
    before, after = (sqnr(source, each, validation, is_channels_last=True) for each in (int8, path))
    assert after > before - 3


def test_a_broken_layer_is_mended(
    float_onnx: Path, calibration: np.ndarray, validation: np.ndarray, tmp_path: Path
) -> None:
    int8, broken, mended = (tmp_path / name for name in ("int8.onnx", "broken.onnx", "mended.onnx"))
    quantize_onnx(float_onnx, int8, np.split(calibration, len(calibration)))
    model = onnx.load(str(int8))
    (scale,) = (each for each in model.graph.initializer if each.name == "model.branch.3.weight_scale")
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * np.float32(1.5), scale.name))
    onnx.save(model, str(broken))
    was, is_broken = (sqnr(float_onnx, path, validation, is_channels_last=False) for path in (int8, broken))
    assert is_broken < was - 6
    mix_onnx(float_onnx, broken, mended, {"branch.3": FLOAT})
    assert sqnr(float_onnx, mended, validation, is_channels_last=False) > was - 1
    mix_onnx(float_onnx, broken, mended, {"branch.3": WEIGHTS})  # its weights are what is broken
    assert sqnr(float_onnx, mended, validation, is_channels_last=False) < was - 6


def test_what_lies_between_layers_in_float_is_in_float_too(
    float_onnx: Path, calibration: np.ndarray, tmp_path: Path
) -> None:
    int8, path = tmp_path / "int8.onnx", tmp_path / "mixed.onnx"
    quantize_onnx(float_onnx, int8, np.split(calibration, len(calibration)))
    mix_onnx(float_onnx, int8, path, {"down": FLOAT, "head": FLOAT})
    graph = onnx.load(str(path)).graph
    makers = {name: node for node in graph.node for name in node.output}
    (pool,) = (node for node in graph.node if node.op_type == "GlobalAveragePool")
    assert makers[pool.input[0]].op_type in {"Clip", "Conv"}  # and no DequantizeLinear
    conv = next(node for node in graph.node if node.op_type == "Conv" and "branch" in node.input[1])
    assert makers[conv.input[0]].op_type == "DequantizeLinear"


def test_integers_of_the_int8_file_are_kept(float_tflite: Path, calibration: np.ndarray, tmp_path: Path) -> None:
    from ai_edge_litert.tools import flatbuffer_utils

    int8, changed, mixed = (tmp_path / f"{name}.tflite" for name in ("int8", "changed", "mixed"))
    quantize_tflite(float_tflite, int8, [image.transpose(0, 2, 3, 1) for image in np.split(calibration, 24)])
    model = flatbuffer_utils.read_model(str(int8))
    (graph,) = model.subgraphs
    (weights,) = (tensor for tensor in graph.tensors if list(tensor.shape) == [10, 32])
    buffer = model.buffers[weights.buffer]
    buffer.data = np.asarray(buffer.data) // 2 * 2  # as if rounded otherwise
    flatbuffer_utils.write_model(model, str(changed))
    mix_tflite(float_tflite, changed, mixed, {"stem": FLOAT})
    model = flatbuffer_utils.read_model(str(mixed))
    (weights,) = (tensor for tensor in model.subgraphs[0].tensors if list(tensor.shape) == [10, 32])
    np.testing.assert_array_equal(np.asarray(model.buffers[weights.buffer].data) % 2, 0)
