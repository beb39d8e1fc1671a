"""A small network with outputs of two ranks, as ONNX and TFLite files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sepdeploy.export.onnx import export_onnx
from sepdeploy.export.tflite import export_tflite
from sepdeploy.quantize.onnx_qdq import quantize_onnx
from sepdeploy.quantize.tflite_int8 import quantize_tflite


class Net(nn.Module):
    """The 4-D output comes first: runtimes may list it last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.conv(x))
        return x, self.head(x.mean((2, 3)))


@pytest.fixture(scope="session")
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="session")
def batch() -> np.ndarray:
    """(N, C, H, W), all four different."""
    return np.random.default_rng(0).standard_normal((5, 3, 8, 6)).astype(np.float32)


@pytest.fixture(scope="session")
def wanted(net: nn.Module, batch: np.ndarray) -> tuple[np.ndarray, ...]:
    with torch.no_grad():
        return tuple(output.numpy() for output in net(torch.from_numpy(batch)))


@pytest.fixture(scope="session")
def onnx_file(net: nn.Module, batch: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    export_onnx(net, torch.from_numpy(batch[:1]), path)
    return path


@pytest.fixture(scope="session")
def tflite_file(net: nn.Module, batch: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("litert_torch", reason="needs sepdeploy[tflite]")
    path = tmp_path_factory.mktemp("tflite") / "net.tflite"
    export_tflite(net, torch.from_numpy(batch[:1]), path, is_channels_last=True)
    return path


@pytest.fixture(scope="session")
def int8_tflite_file(tflite_file: Path, batch: np.ndarray) -> Path:
    path = tflite_file.with_name("int8.tflite")
    quantize_tflite(tflite_file, path, (batch[i : i + 1].transpose(0, 2, 3, 1) for i in range(len(batch))))
    return path


@pytest.fixture(scope="session")
def int8_onnx_file(onnx_file: Path, batch: np.ndarray) -> Path:
    path = onnx_file.with_name("net.int8.onnx")
    quantize_onnx(onnx_file, path, (batch[i : i + 1] for i in range(len(batch))))
    return path
