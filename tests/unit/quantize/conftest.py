"""A small network with the statistics of a trained one, exported once for all tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sepdeploy.export.onnx import export_onnx
from sepdeploy.export.tflite import export_tflite

SHAPE = (3, 16, 12)


class Net(nn.Module):
    """Dense, grouped and depthwise convolutions, a residual addition, pooling, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.branch = nn.Sequential(
            nn.Conv2d(16, 16, 3, padding=1, groups=4, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False),
            nn.BatchNorm2d(16),
        )
        self.down = nn.Sequential(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU6())
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.branch(x))
        return self.head(self.down(x).mean((2, 3)))


def smooth_images(count: int, seed: int) -> np.ndarray:
    """Images whose neighbouring pixels are alike, as in photographs, (count, C, H, W) float32."""
    noise = np.random.default_rng(seed).standard_normal((count, SHAPE[0], SHAPE[1] // 4, SHAPE[2] // 4))
    return noise.repeat(4, axis=2).repeat(4, axis=3).astype(np.float32)


@pytest.fixture(scope="session")
def net() -> nn.Module:
    torch.manual_seed(0)
    net = Net()
    net.train()
    with torch.no_grad():  # batch norms that fit the data, as after training
        for seed in range(30):
            net(torch.from_numpy(smooth_images(32, seed)))
    return net.eval()


@pytest.fixture(scope="session")
def calibration() -> np.ndarray:
    return smooth_images(24, 100)


@pytest.fixture(scope="session")
def validation() -> np.ndarray:
    return smooth_images(24, 200)


@pytest.fixture(scope="session")
def float_onnx(net: nn.Module, calibration: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    export_onnx(net, torch.from_numpy(calibration[:1]), path)
    return path


@pytest.fixture(scope="session")
def float_tflite(net: nn.Module, calibration: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("litert_torch", reason="needs sepdeploy[tflite]")
    path = tmp_path_factory.mktemp("tflite") / "net.tflite"
    export_tflite(net, torch.from_numpy(calibration[:1]), path, is_channels_last=True)
    return path
