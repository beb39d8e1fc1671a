from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from sepdeploy.analyze.trace import trace_network
from sepdeploy.bench.session import open_session
from sepdeploy.core.int8_proof import FloatLayer, FloatReason, Int8Proof
from sepdeploy.errors import ContractError, UsageError
from sepdeploy.quantize.int8_share import int8_share_of_onnx, int8_share_of_tflite
from sepdeploy.quantize.layer_sqnr import layer_sqnr_of_onnx, layer_sqnr_of_tflite
from sepdeploy.quantize.onnx_qdq import quantize_onnx
from sepdeploy.quantize.tflite_int8 import quantize_tflite

LAYERS = ["stem.0", "branch.0", "branch.3", "down.0", "head"]


@pytest.fixture(scope="module")
def int8_onnx(float_onnx: Path, calibration: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("int8") / "net.onnx"
    quantize_onnx(float_onnx, path, np.split(calibration, len(calibration)))
    return path


@pytest.fixture(scope="module")
def int8_tflite(float_tflite: Path, calibration: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("int8") / "net.tflite"
    quantize_tflite(float_tflite, path, nhwc(calibration))
    return path


def nhwc(images: np.ndarray) -> list[np.ndarray]:
    return [np.ascontiguousarray(image.transpose(0, 2, 3, 1)) for image in np.split(images, len(images))]


def test_all_macs_of_an_ordinary_network_are_in_int8(
    net: nn.Module, int8_onnx: Path, int8_tflite: Path, calibration: np.ndarray
) -> None:
    macs = trace_network(net, torch.from_numpy(calibration[:1])).total_macs
    assert int8_share_of_onnx(int8_onnx) == Int8Proof(macs, macs, ())
    assert int8_share_of_tflite(int8_tflite) == Int8Proof(macs, macs, ())


def test_none_of_a_float_file_are(float_onnx: Path, float_tflite: Path) -> None:
    for proof in (int8_share_of_onnx(float_onnx), int8_share_of_tflite(float_tflite)):
        assert proof.int8_macs == 0
        assert sorted(layer.name for layer in proof.float_layers) == sorted(LAYERS)
        assert {layer.reason for layer in proof.float_layers} == {FloatReason.WEIGHTS}
        assert [layer.macs for layer in proof.float_layers] == sorted(
            (layer.macs for layer in proof.float_layers), reverse=True
        )


def one_conv(
    path: Path,
    *,
    op_type: str = "Conv",
    data: str = "uint8",
    weights: str = "int8",
    is_output_float: bool = False,
) -> Path:
    """A file of one operator on (1, 4, 8, 8), 4 to 4 channels, 1x1, with conversions around it where asked for."""
    kernel = np.ones((4, 4, 1, 1))
    constants = {"s": np.float32(0.1), "z": np.zeros((), data if data != "float32" else "uint8")}
    nodes = []
    x_type = helper.np_dtype_to_tensor_dtype(np.dtype(data))
    x = "x"
    if data != "float32":
        nodes.append(helper.make_node("DequantizeLinear", ["x", "s", "z"], ["xd"]))
        x = "xd"
    constants["w"] = kernel.astype(weights)
    w = "w"
    if weights != "float32":
        constants["zw"] = np.zeros((), weights)
        nodes.append(helper.make_node("DequantizeLinear", ["w", "s", "zw"], ["wd"]))
        w = "wd"
    nodes.append(helper.make_node(op_type, [x, w], ["y"], "node_conv"))
    y, y_type = "y", TensorProto.FLOAT
    if not is_output_float:
        nodes.append(helper.make_node("QuantizeLinear", ["y", "s", "z"], ["q"]))
        y, y_type = "q", helper.np_dtype_to_tensor_dtype(constants["z"].dtype)
    graph = helper.make_graph(
        nodes,
        "one_conv",
        [helper.make_tensor_value_info("x", x_type, (1, 4, 8, 8))],
        [helper.make_tensor_value_info(y, y_type, (1, 4, 8, 8))],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), str(path))
    return path


def test_int8_conv(tmp_path: Path) -> None:
    assert int8_share_of_onnx(one_conv(tmp_path / "conv.onnx")) == Int8Proof(1024, 1024, ())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"op_type": "ConvTranspose"}, FloatReason.NO_KERNEL),
        ({"data": "float32"}, FloatReason.WEIGHTS_ONLY),
        ({"data": "float32", "weights": "float32"}, FloatReason.WEIGHTS),
        ({"data": "float32", "is_output_float": True}, FloatReason.WEIGHTS_ONLY),
        ({"is_output_float": True}, FloatReason.OUTPUT),
        ({"data": "int8", "weights": "uint8"}, FloatReason.NOT_FUSED),
    ],
)
def test_every_reason_of_onnx(tmp_path: Path, options: dict[str, object], reason: FloatReason) -> None:
    path = one_conv(tmp_path / "conv.onnx", **options)  # type: ignore[arg-type]
    op_type = str(options.get("op_type", "Conv"))
    assert int8_share_of_onnx(path) == Int8Proof(1024, 0, (FloatLayer("conv", op_type, 1024, reason),))


@pytest.mark.parametrize(
    ("recipe_name", "reason"),
    [("weight_only_wi8_afp32", FloatReason.WEIGHTS_ONLY), ("dynamic_wi8_afp32", FloatReason.INPUT)],
)
def test_int8_weights_alone_are_not_called_int8(
    float_tflite: Path, tmp_path: Path, recipe_name: str, reason: FloatReason
) -> None:
    from ai_edge_quantizer import quantizer, recipe

    result = quantizer.Quantizer(str(float_tflite), getattr(recipe, recipe_name)()).quantize()
    path = tmp_path / "weights.tflite"
    path.write_bytes(bytes(result.quantized_model))
    proof = int8_share_of_tflite(path)
    assert proof.int8_macs == 0
    assert reason in {layer.reason for layer in proof.float_layers}


@pytest.mark.parametrize("content", [b"", b"garbage" * 50])
def test_damaged_files_are_usage_errors(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="not a valid TFLite"):
        int8_share_of_tflite(path)
    with pytest.raises(UsageError, match="cannot load"):
        int8_share_of_onnx(path)


def test_a_proof_must_add_up() -> None:
    with pytest.raises(ContractError, match="add up"):
        Int8Proof(10, 9, ())
    assert Int8Proof(0, 0, ()).ratio == 1


def output_sqnr(source: Path, int8: Path, images: np.ndarray, *, is_channels_last: bool) -> float:
    expected, found = (
        open_session(path, is_channels_last=is_channels_last).predict(images)[0].astype(np.float64)
        for path in (source, int8)
    )
    return float(10 * np.log10((expected**2).sum() / ((expected - found) ** 2).sum()))


def test_ratio_behind_the_last_layer_is_that_of_the_outputs(
    float_onnx: Path, int8_onnx: Path, float_tflite: Path, int8_tflite: Path, validation: np.ndarray
) -> None:
    images = validation[:8]
    by_onnx = layer_sqnr_of_onnx(float_onnx, int8_onnx, np.split(images, 8))
    by_tflite = layer_sqnr_of_tflite(float_tflite, int8_tflite, nhwc(images))
    assert [layer.name for layer in by_onnx] == [layer.name for layer in by_tflite] == LAYERS
    expected = output_sqnr(float_onnx, int8_onnx, images, is_channels_last=False)
    assert by_onnx[-1].sqnr_db == pytest.approx(expected, abs=0.01)
    # Other kernels than those of the session round some values the other way.
    expected = output_sqnr(float_tflite, int8_tflite, images, is_channels_last=True)
    assert by_tflite[-1].sqnr_db == pytest.approx(expected, abs=0.5)


def test_a_layer_that_was_broken_loses_most(
    float_onnx: Path, int8_onnx: Path, validation: np.ndarray, tmp_path: Path
) -> None:
    model = onnx.load(str(int8_onnx))
    (scale,) = (each for each in model.graph.initializer if each.name == "model.branch.3.weight_scale")
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * np.float32(1.5), scale.name))
    broken = tmp_path / "broken.onnx"
    onnx.save(model, str(broken))
    layers = layer_sqnr_of_onnx(float_onnx, broken, np.split(validation[:4], 4))
    proof = Int8Proof(0, 0, (), layers)
    assert proof.weakest[0].name == "branch.3"
    assert proof.weakest[0].sqnr_db == pytest.approx(6, abs=2)  # half of the values is error
