"""How fast the ways to write down T = 2 depthwise-separable terms are, as ratios to the dense convolution.

    python tests/benchmarks/term_lowerings.py

Each block is a 3x3 convolution with batch norm folded and a ReLU, between two 1x1 convolutions that give it realistic
neighbours. Every form computes the same function. Prints, for each runtime and precision, the median speed-up over the
dense block and its 95% interval; all forms of a row are interleaved in one run on one thread.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sepdeploy.bench.environment import environment
from sepdeploy.bench.session import open_session
from sepdeploy.bench.timing import measure
from sepdeploy.export.onnx import export_onnx
from sepdeploy.export.tflite import export_tflite
from sepdeploy.quantize.onnx_qdq import quantize_onnx
from sepdeploy.quantize.tflite_int8 import quantize_tflite

TERMS = 2
SHAPES = ((16, 32), (64, 16), (128, 28), (256, 14))


class Branches(nn.Module):
    """T pairs side by side, added: what sepdeploy exports in float32."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False) for _ in range(TERMS)
        )
        self.pointwise = nn.ModuleList(nn.Conv2d(channels, channels, 1, bias=t == 0) for t in range(TERMS))

    def forward(self, x: Tensor) -> Tensor:
        first, *rest = (p(d(x)) for d, p in zip(self.depthwise, self.pointwise, strict=True))
        for term in rest:
            first = first + term
        return first


class Concatenated(nn.Module):
    """T depthwise convolutions, concatenated, then one pointwise convolution: what sepdeploy exports in int8."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False) for _ in range(TERMS)
        )
        self.pointwise = nn.Conv2d(TERMS * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(torch.cat([d(x) for d in self.depthwise], dim=1))


def multiplier(channels: int) -> nn.Module:
    """One depthwise convolution with channel multiplier T, then one pointwise convolution."""
    return nn.Sequential(
        nn.Conv2d(channels, TERMS * channels, 3, padding=1, groups=channels, bias=False),
        nn.Conv2d(TERMS * channels, channels, 1),
    )


def block(middle: nn.Module, channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, channels, 1), nn.ReLU(), middle, nn.ReLU(), nn.Conv2d(channels, channels, 1)
    ).eval()


def main() -> None:
    torch.manual_seed(0)
    print(environment("onnxruntime and ai-edge-litert", 1))
    for channels, size in SHAPES:
        forms = {
            "dense": nn.Conv2d(channels, channels, 3, padding=1),
            "branches": Branches(channels),
            "concatenated": Concatenated(channels),
            "multiplier": multiplier(channels),
        }
        with tempfile.TemporaryDirectory() as folder:
            files = {
                name: export_all(block(form, channels), channels, size, Path(folder) / name)
                for name, form in forms.items()
            }
            for kind in ("onnx", "int8.onnx", "tflite", "int8.tflite"):
                sessions = {name: open_session(Path(f"{base}.{kind}")) for name, base in files.items()}
                results = measure(sessions, reference="dense", threads=1, seconds=1.0)
                cells = "  ".join(
                    f"{name} {latency.speedup:.2f}x ({latency.speedup_low:.2f}-{latency.speedup_high:.2f})"
                    for name, latency in results.items()
                    if latency.speedup is not None
                )
                print(
                    f"{channels:4d} channels {size}x{size} {kind:12s} dense "
                    f"{results['dense'].median_ms:.3f} ms  {cells}",
                    flush=True,
                )


def export_all(network: nn.Module, channels: int, size: int, base: Path) -> Path:
    example = torch.randn(1, channels, size, size)
    images = [np.random.default_rng(i).standard_normal((1, channels, size, size)).astype(np.float32) for i in range(4)]
    export_onnx(network, example, Path(f"{base}.onnx"))
    quantize_onnx(Path(f"{base}.onnx"), Path(f"{base}.int8.onnx"), images)
    export_tflite(network, example, Path(f"{base}.tflite"), is_channels_last=True)
    quantize_tflite(Path(f"{base}.tflite"), Path(f"{base}.int8.tflite"), [x.transpose(0, 2, 3, 1) for x in images])
    return base


if __name__ == "__main__":
    main()
