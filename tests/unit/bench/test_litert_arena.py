"""The arena of LiteRT, and what liveness predicts of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from sepdeploy.analyze.liveness import measure_memory
from sepdeploy.analyze.trace import conv_spec
from sepdeploy.bench.litert_arena import measure_arena
from sepdeploy.core.artifact import Precision
from sepdeploy.core.chain import Chain, ChainSum, Factor
from sepdeploy.errors import UsageError
from sepdeploy.export.tflite import export_tflite
from sepdeploy.models.mobilenet import mobilenet_v1
from sepdeploy.models.resnet_cifar import resnet20, resnet56
from sepdeploy.quantize.tflite_int8 import quantize_tflite
from sepdeploy.schemes.module import ChainConv2d

pytest.importorskip("litert_torch", reason="needs sepdeploy[tflite]")

NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet20": (resnet20, 32),
    "resnet56": (resnet56, 32),
    "mobilenet_v1": (mobilenet_v1, 224),
}
"""Name -> factory and image size."""


def calibrated(factory: Callable[[], nn.Module], images: Tensor) -> nn.Module:
    """A network whose batch norms fit these images: others make int8 scales that LiteRT's kernels refuse."""
    torch.manual_seed(0)
    model = factory()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    model.train()
    with torch.no_grad():
        model(images)
    return model.eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_liveness_predicts_the_arena(name: str, tmp_path: Path) -> None:
    factory, size = NETWORKS[name]
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1))
    model = calibrated(factory, images)
    float_file, int8_file = tmp_path / "float32.tflite", tmp_path / "int8.tflite"
    export_tflite(model, images[:1], float_file, is_channels_last=True)
    quantize_tflite(float_file, int8_file, (np.ascontiguousarray(i[None].permute(0, 2, 3, 1)) for i in images))
    memory = measure_memory(model, images[:1])
    for precision, path in ((Precision.FLOAT32, float_file), (Precision.INT8, int8_file)):
        arena = measure_arena(path)
        assert memory.peak_bytes(precision) == pytest.approx(arena.tensor_bytes, rel=0.1)
        assert arena.bytes_with_scratch >= arena.tensor_bytes


class Around(nn.Module):
    """A layer between two convolutions that need less memory than it does."""

    def __init__(self, layer: Callable[[Tensor], Tensor], channels: int) -> None:
        super().__init__()
        self.before = nn.Conv2d(4, 16, 1)
        self.layer = layer
        self.after = nn.Conv2d(channels, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.layer(self.before(x)))


def shuffled(x: Tensor) -> Tensor:
    return F.channel_shuffle(x, 4)


def residual(x: Tensor) -> Tensor:
    return x + torch.sigmoid(x) * 0.5


def concatenated(x: Tensor) -> Tensor:
    return torch.cat((x, torch.tanh(x), x[:, :8]), 1)


def sliced(x: Tensor) -> Tensor:
    return F.pad(x[:, :, ::2, 1::2], (0, 0, 0, 0, 8, 8))


def separable() -> nn.Module:
    """Two depthwise-separable terms in place of a 3x3 convolution."""
    dense = nn.Conv2d(16, 16, 3, padding=1)
    term = Chain((Factor(16, 16, (3, 3), padding=(1, 1, 1, 1), groups=16), Factor(16, 16, (1, 1))))
    return ChainConv2d(ChainSum((term, term)), conv_spec(dense), bias=True)


LAYERS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "padding at stride 2": (nn.Conv2d(16, 16, 3, stride=2, padding=1), 16),
    "depthwise padding at stride 2": (nn.Conv2d(16, 16, 5, stride=2, padding=2, groups=16), 16),
    "same padding at stride 2": (nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(16, 16, 3, stride=2)), 16),
    "zero pad that fuses": (nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(16, 16, 3)), 16),
    "zero pad that does not": (nn.Sequential(nn.ZeroPad2d((2, 1, 2, 1)), nn.Conv2d(16, 16, 3)), 16),
    "too much padding": (nn.Conv2d(16, 16, 3, padding=2), 16),
    "dilation": (nn.Conv2d(16, 16, 3, padding=2, dilation=2), 16),
    "max pool": (nn.MaxPool2d(3, 2, 1), 16),
    "max pool at stride 1": (nn.MaxPool2d(3, 1, 1), 16),
    "average pool": (nn.AvgPool2d(3, 1, 1), 16),
    "transposed": (nn.ConvTranspose2d(16, 16, 2, 2), 16),
    "upsampling": (nn.Upsample(scale_factor=2), 16),
    "batch norm and ReLU6": (nn.Sequential(nn.Conv2d(16, 32, 1), nn.BatchNorm2d(32), nn.ReLU6()), 32),
    "sigmoid": (nn.Sequential(nn.Conv2d(16, 32, 1), nn.Sigmoid()), 32),
    "swish": (nn.Sequential(nn.Conv2d(16, 32, 1), nn.SiLU()), 32),
    "shuffle": (shuffled, 16),
    "residual": (residual, 16),
    "concatenation": (concatenated, 40),
    "slices": (sliced, 32),
    "chains": (separable(), 16),
}
"""Name -> layer of 16 channels in, and its channels out."""


@pytest.mark.parametrize("name", LAYERS)
def test_liveness_follows_the_exporter(name: str, tmp_path: Path) -> None:
    layer, channels = LAYERS[name]
    torch.manual_seed(0)
    model = Around(layer, channels).eval()
    example = torch.zeros(1, 4, 16, 16)
    path = tmp_path / "net.tflite"
    export_tflite(model, example, path, is_channels_last=True)
    assert measure_memory(model, example).peak_bytes(Precision.FLOAT32) == measure_arena(path).tensor_bytes


def test_im2col_is_scratch(tmp_path: Path) -> None:
    """Optimized kernels copy the 3x3 window of every output pixel; a 1x1 convolution has nothing to copy."""
    example = torch.zeros(1, 16, 16, 16)
    scratch = {}
    for kernel in (1, 3):
        model = nn.Conv2d(16, 16, kernel, padding=kernel // 2).eval()
        path = tmp_path / f"conv{kernel}.tflite"
        export_tflite(model, example, path, is_channels_last=True)
        arena = measure_arena(path)
        assert arena.tensor_bytes == 2 * 4 * 16**3
        scratch[kernel] = arena.bytes_with_scratch - arena.tensor_bytes
    assert scratch == {1: 0, 3: 4 * 9 * 16**3}


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.tflite"
    path.write_bytes(b"no model at all")
    with pytest.raises(UsageError, match=r"net\.tflite"):
        measure_arena(path)
