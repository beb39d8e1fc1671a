from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from sepdeploy.bench.litert import LitertSession
from sepdeploy.export.tflite import export_tflite
from sepdeploy.quantize.inspect_int8 import float_ops_of_tflite
from sepdeploy.quantize.join_int8 import join_int8
from sepdeploy.quantize.tflite_int8 import quantize_tflite


class Leaky(nn.Module):
    """Leaky ReLUs in the middle, read twice, behind each other and at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.leaky_relu(self.first(x), 0.1)
        return nn.functional.leaky_relu(self.second(y) + nn.functional.leaky_relu(y, 0.2), 0.3)


def test_leaky_relu_is_computed_in_int8(tmp_path: Path) -> None:
    from ai_edge_litert.interpreter import Interpreter

    torch.manual_seed(0)
    network, images = Leaky().eval(), torch.randn(4, 3, 8, 8)
    export_tflite(network, images[:1], tmp_path / "float.tflite", is_channels_last=True)
    nhwc = [image[None] for image in images.permute(0, 2, 3, 1).numpy()]
    quantize_tflite(tmp_path / "float.tflite", tmp_path / "int8.tflite", nhwc)
    assert float_ops_of_tflite(tmp_path / "int8.tflite") == ()
    (output,) = LitertSession(tmp_path / "int8.tflite", is_channels_last=True).predict(images.numpy())
    with torch.no_grad():
        wanted = network(images).numpy()
    assert 10 * np.log10((wanted**2).sum() / ((output - wanted) ** 2).sum()) > 30
    names = [
        {each["name"] for each in Interpreter(str(tmp_path / file)).get_tensor_details() if each["dtype"] is dtype}
        for file, dtype in (("float.tflite", np.float32), ("int8.tflite", np.int8))
    ]
    assert len(names[0] & names[1]) >= 6, "activations keep their names, by which ranges are found"
    data = (tmp_path / "int8.tflite").read_bytes()
    assert join_int8(data) == (data, 0)
