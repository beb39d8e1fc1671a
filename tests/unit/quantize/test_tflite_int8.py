from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sepdeploy.bench.litert import LitertSession
from sepdeploy.errors import ToolError, UsageError
from sepdeploy.export.tflite import export_tflite
from sepdeploy.quantize.inspect_int8 import float_ops_of_tflite
from sepdeploy.quantize.tflite_int8 import quantize_tflite


def single(images: np.ndarray) -> Iterator[np.ndarray]:
    """Channels-last images, one by one."""
    return (images[i : i + 1].transpose(0, 2, 3, 1) for i in range(len(images)))


@pytest.fixture(scope="module")
def int8_tflite(float_tflite: Path, calibration: np.ndarray) -> Path:
    path = float_tflite.with_name("int8.tflite")
    quantize_tflite(float_tflite, path, single(calibration))
    return path


def test_outputs_stay_close(net: nn.Module, int8_tflite: Path, validation: np.ndarray) -> None:
    (output,) = LitertSession(int8_tflite, is_channels_last=True).predict(validation)
    with torch.no_grad():
        wanted = net(torch.from_numpy(validation)).numpy()
    assert 10 * np.log10(np.sum(wanted**2) / np.sum((output - wanted) ** 2)) > 20


def test_everything_is_int8(int8_tflite: Path, float_tflite: Path) -> None:
    from ai_edge_litert.interpreter import Interpreter

    assert float_ops_of_tflite(int8_tflite) == ()
    assert "CONV_2D x3" in float_ops_of_tflite(float_tflite)
    assert "DEPTHWISE_CONV_2D x1" in float_ops_of_tflite(float_tflite)
    interpreter = Interpreter(str(int8_tflite))
    for detail in (*interpreter.get_input_details(), *interpreter.get_output_details()):
        assert detail["dtype"] is np.int8
    kernels = [detail for detail in interpreter.get_tensor_details() if len(detail["shape"]) == 4]
    assert {16, 32} <= {len(detail["quantization_parameters"]["scales"]) for detail in kernels}


def test_ranges_span_all_images_not_an_average(float_tflite: Path, calibration: np.ndarray, tmp_path: Path) -> None:
    from ai_edge_litert.interpreter import Interpreter

    spread = np.concatenate([calibration[:1] * 0 + 5, calibration[:1] * 0 - 3, calibration[:1] * 0])
    quantize_tflite(float_tflite, tmp_path / "int8.tflite", single(spread))
    (detail,) = Interpreter(str(tmp_path / "int8.tflite")).get_input_details()
    assert detail["quantization_parameters"]["scales"] == pytest.approx([8 / 255], rel=1e-5)


def test_same_images_give_same_bytes(int8_tflite: Path, float_tflite: Path, calibration: np.ndarray) -> None:
    again = float_tflite.with_name("again.tflite")
    quantize_tflite(float_tflite, again, single(calibration))
    assert again.read_bytes() == int8_tflite.read_bytes()


def test_images_stream_one_at_a_time(float_tflite: Path, calibration: np.ndarray, tmp_path: Path) -> None:
    import weakref

    alive: list[weakref.ref[np.ndarray]] = []
    most_alive = 0

    def images() -> Iterator[np.ndarray]:
        nonlocal most_alive
        for _ in range(8):
            image = calibration[:1].transpose(0, 2, 3, 1).copy()
            alive.append(weakref.ref(image))
            most_alive = max(most_alive, sum(ref() is not None for ref in alive))
            yield image
            del image

    quantize_tflite(float_tflite, tmp_path / "int8.tflite", images())
    assert most_alive <= 2


def test_images_that_do_not_fit_are_usage_errors(float_tflite: Path, calibration: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there are none"):
        quantize_tflite(float_tflite, tmp_path / "int8.tflite", [])
    with pytest.raises(UsageError, match=r"shape \(1, 3, 16, 12\), the network takes \(1, 16, 12, 3\)"):
        quantize_tflite(float_tflite, tmp_path / "int8.tflite", [calibration[:1]])


def test_damaged_file_is_a_tool_error(calibration: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "bad.tflite").write_bytes(b"not a network")
    with pytest.raises(ToolError, match=r"could not quantize .*bad\.tflite"):
        quantize_tflite(tmp_path / "bad.tflite", tmp_path / "int8.tflite", single(calibration))


class Constants(nn.Module):
    """Constants that have to be in the scale of what an operator returns: CoordConv, and F.normalize."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.register_buffer("rows", torch.linspace(-1, 1, 4).view(1, 1, 4, 1).expand(1, 1, 4, 4).clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.cat([self.conv(x), self.rows.expand(len(x), -1, -1, -1)], 1)
        return nn.functional.normalize(y.mean((2, 3)) + y[:, :, 0, 0], dim=1)


def test_constants_take_the_scale_of_the_output(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, images = Constants().eval(), torch.rand(4, 3, 6, 6)
    export_tflite(network, images[:1], tmp_path / "float.tflite", is_channels_last=True)
    quantize_tflite(tmp_path / "float.tflite", tmp_path / "int8.tflite", single(images.numpy()))
    (output,) = LitertSession(tmp_path / "int8.tflite", is_channels_last=True).predict(images.numpy())
    with torch.no_grad():
        np.testing.assert_allclose(output, network(images).numpy(), atol=0.03)


class Exponentials(nn.Module):
    """Activations that litert-torch writes down with large exponentials, among which 8 bits lose all else."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.activations = nn.ModuleList(
            [nn.ELU(0.5), nn.CELU(0.5), nn.SELU(), nn.Softplus(2.0), nn.Mish(), nn.Softplus(threshold=1.0)]
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.conv(x)
        changed = nn.functional.elu(y + 1, inplace=True)
        return changed, *(activation(y) for activation in self.activations)


def test_activations_with_exponentials_keep_their_small_values(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, images = Exponentials().eval(), torch.randn(4, 3, 12, 12)
    with torch.no_grad():
        network.conv.weight.mul_(6)
        wanted = [each.numpy() for each in network(images)]
    assert min(each.max() for each in wanted) > 8  # exp(8) is 3,000 times exp(0)
    export_tflite(network, images[:1], tmp_path / "float.tflite", is_channels_last=True)
    quantize_tflite(tmp_path / "float.tflite", tmp_path / "int8.tflite", single(images.numpy()))
    for name, least in (("float.tflite", 100), ("int8.tflite", 28)):
        outputs = LitertSession(tmp_path / name, is_channels_last=True).predict(images.numpy())
        sqnr = [10 * np.log10((w**2).sum() / ((o - w) ** 2).sum()) for o, w in zip(outputs, wanted, strict=True)]
        exact = sqnr[:-1] if name == "int8.tflite" else sqnr  # of a threshold of its own only the function is kept
        assert min(exact) > least, sqnr


def test_pools_and_norms_that_litert_torch_does_not_know_or_writes_as_loops(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.AvgPool2d(3, 1, 1, count_include_pad=False),  # the padding that TFLite calls SAME
        nn.AvgPool2d((3, 2), 2, 1, ceil_mode=True, count_include_pad=False),
        nn.LocalResponseNorm(4, alpha=0.5, k=2.0),
        nn.Upsample(scale_factor=1.7),  # litert-torch picks other neighbours
        nn.AdaptiveMaxPool2d((None, 4)),  # and does not know this one
        nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False),
        nn.AdaptiveMaxPool2d(1),
    ).eval()
    images = torch.randn(4, 3, 12, 12)
    export_tflite(network, images[:1], tmp_path / "float.tflite", is_channels_last=True)
    quantize_tflite(tmp_path / "float.tflite", tmp_path / "int8.tflite", single(images.numpy()))
    with torch.no_grad():
        wanted = network(images).numpy()
    for name, least in (("float.tflite", 100), ("int8.tflite", 26)):
        (output,) = LitertSession(tmp_path / name, is_channels_last=True).predict(images.numpy())
        assert 10 * np.log10((wanted**2).sum() / ((output - wanted) ** 2).sum()) > least, name
    from ai_edge_litert.interpreter import Interpreter

    operators = Counter(each["op_name"] for each in Interpreter(str(tmp_path / "int8.tflite"))._get_ops_details())
    assert (operators["AVERAGE_POOL_2D"], operators["MAX_POOL_2D"]) == (3, 1)
    assert operators["PAD"] + operators["PADV2"] == 1  # of the second average


def test_missing_quantizer_says_how_to_install_it(
    float_tflite: Path, calibration: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ai_edge_quantizer.quantizer", None)
    monkeypatch.setitem(sys.modules, "ai_edge_quantizer", None)
    with pytest.raises(ToolError, match=r"pip install 'sepdeploy\[tflite\]'"):
        quantize_tflite(float_tflite, tmp_path / "int8.tflite", single(calibration))
