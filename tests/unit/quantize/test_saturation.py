"""int8 products that are too large for processors without VNNI must not go wrong unseen."""

import numpy as np
import pytest
import torch
from torch import nn

from sepdeploy.bench.onnxruntime import OrtSession
from sepdeploy.export.onnx import export_onnx
from sepdeploy.quantize import onnx_qdq
from sepdeploy.quantize.saturation import saturates_u8s8

CHANNELS = 32


@pytest.fixture(scope="module")
def large_products(tmp_path_factory):
    """A float file whose inputs and weights all sit at the upper end of their ranges, and images for it."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 3), nn.ReLU(), nn.Conv2d(CHANNELS, CHANNELS, 1)).eval()
    with torch.no_grad():
        for conv in (network[0], network[2]):
            conv.weight.uniform_(0.9, 1.0)
    images = np.random.default_rng(0).uniform(0.8, 1.0, (8, CHANNELS, 6, 6)).astype(np.float32)
    path = tmp_path_factory.mktemp("saturation") / "float.onnx"
    export_onnx(network, torch.from_numpy(images[:1]), path)
    return path, images


def relative_error(path, images, tmp_path) -> float:
    onnx_qdq.quantize_onnx(path, tmp_path / "int8.onnx", (image[None] for image in images))
    (expected,), (found,) = OrtSession(path).predict(images), OrtSession(tmp_path / "int8.onnx").predict(images)
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def test_large_products_are_right_on_this_processor(large_products, tmp_path):
    assert relative_error(*large_products, tmp_path) < 0.02


def test_probe_says_what_full_range_weights_really_do_here(large_products, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_qdq, "saturates_u8s8", lambda: False)
    assert (relative_error(*large_products, tmp_path) > 0.02) == saturates_u8s8()
