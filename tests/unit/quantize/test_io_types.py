"""int8 files take and return the type that was asked for, whatever else reads or returns the same tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from sepdeploy.bench.session import open_session
from sepdeploy.core.onnx_steps import output_steps
from sepdeploy.export.onnx import export_onnx
from sepdeploy.export.tflite import export_tflite
from sepdeploy.quantize.onnx_qdq import quantize_onnx
from sepdeploy.quantize.tflite_int8 import quantize_tflite

IMAGES = np.random.default_rng(0).standard_normal((8, 3, 8, 8)).astype(np.float32)

TYPES = {"float32": "FLOAT", "int8": "INT8", "uint8": "UINT8"}


class Tapped(nn.Module):
    """Returns features that it goes on with, one of them twice, class scores, and its own input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        features = self.conv(x).relu()
        return features, self.linear(features.mean((2, 3))), features, x


@pytest.fixture(scope="module")
def tapped() -> nn.Module:
    torch.manual_seed(0)
    return Tapped().eval()


@pytest.fixture(scope="module")
def folder(tapped: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("io")
    export_onnx(tapped, torch.from_numpy(IMAGES[:1]), folder / "net.onnx")
    return folder


def check(found: tuple[np.ndarray, ...], net: nn.Module, steps: list[float]) -> None:
    """Every output is what the network returns, up to noise of a few steps."""
    with torch.no_grad():
        wanted = net(torch.from_numpy(IMAGES[:4]))
    assert len(found) == len(wanted) == len(steps)
    for a, b, step in zip(found, wanted, steps, strict=True):
        np.testing.assert_allclose(a, b.numpy(), atol=5 * step)


@pytest.mark.parametrize("io", ["float32", "int8", "uint8"])
def test_onnx(folder: Path, tapped: nn.Module, io: Literal["float32", "int8", "uint8"]) -> None:
    path = folder / "int8.onnx"
    quantize_onnx(folder / "net.onnx", path, np.split(IMAGES, 8), io=io)
    model = onnx.load(str(path))
    onnx.checker.check_model(model, full_check=True)
    ends = [end.type.tensor_type.elem_type for end in (*model.graph.input, *model.graph.output)]
    assert [onnx.TensorProto.DataType.Name(end) for end in ends] == [TYPES[io]] * 5
    steps = output_steps(path)
    assert steps[0] == steps[2]
    check(open_session(path).predict(IMAGES[:4]), tapped, steps)
    conversions = sum(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph.node)
    if io == "uint8":  # conversions at the ends are left out where nothing needs them
        assert conversions == 14


@pytest.mark.parametrize("io", ["float32", "int8", "uint8"])
def test_tflite(folder: Path, tapped: nn.Module, io: Literal["float32", "int8", "uint8"]) -> None:
    pytest.importorskip("litert_torch", reason="needs sepdeploy[tflite]")
    source, path = folder / "net.tflite", folder / "int8.tflite"
    if not source.exists():
        export_tflite(tapped, torch.from_numpy(IMAGES[:1]), source, is_channels_last=True)
    nhwc = [np.ascontiguousarray(image.transpose(0, 2, 3, 1)) for image in np.split(IMAGES, 8)]
    quantize_tflite(source, path, nhwc, io=io)
    session = open_session(path, is_channels_last=True)
    details = (*session._interpreter.get_input_details(), *session._interpreter.get_output_details())
    assert [np.dtype(detail["dtype"]).name for detail in details] == [io] * 5
    steps = [np.ptp(output.detach().numpy()) / 200 for output in tapped(torch.from_numpy(IMAGES))]
    check(session.predict(IMAGES[:4]), tapped, steps)
    signature = session._interpreter.get_signature_runner()
    (name,) = signature.get_input_details()
    found = signature(**{name: np.zeros((1, 8, 8, 3), io)})
    assert {output.dtype.name for output in found.values()} == {io}
