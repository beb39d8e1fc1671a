from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sepdeploy.bench.litert import LitertSession
from sepdeploy.errors import ToolError, UnsupportedModelError, UsageError
from sepdeploy.export.tflite import export_tflite
from sepdeploy.quantize.layer_names import tflite_layer_name

pytest.importorskip("ai_edge_litert.interpreter", reason="needs sepdeploy[tflite]")

TOLERANCE = 1e-4  # as for ONNX


def run(path: Path, image: np.ndarray) -> dict[str, np.ndarray]:
    """Outputs by name for one image in the layout of the file."""
    from ai_edge_litert.interpreter import Interpreter

    runner = Interpreter(str(path), num_threads=1).get_signature_runner()
    (name,) = runner.get_input_details()
    return runner(**{name: np.ascontiguousarray(image)})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tflite")


@pytest.fixture(scope="module")
def classifier_file(classifier: nn.Module, images: Tensor, folder: Path) -> Path:
    export_tflite(classifier, images[:1], folder / "classifier.tflite", is_channels_last=True)
    return folder / "classifier.tflite"


@pytest.fixture(scope="module")
def nested_file(nested_outputs: nn.Module, images: Tensor, folder: Path) -> Path:
    export_tflite(nested_outputs, images[:1], folder / "nested.tflite", is_channels_last=True)
    return folder / "nested.tflite"


def test_channels_last_file_computes_what_the_network_computes(
    classifier: nn.Module, classifier_file: Path, images: Tensor
) -> None:
    for i in range(len(images)):
        image = images[i : i + 1]
        (output,) = run(classifier_file, image.permute(0, 2, 3, 1).numpy()).values()
        with torch.no_grad():
            np.testing.assert_allclose(output, classifier(image).numpy(), atol=TOLERANCE, rtol=TOLERANCE)


def test_outputs_keep_their_order_and_4d_ones_turn_channels_last(
    nested_outputs: nn.Module, nested_file: Path, images: Tensor
) -> None:
    outputs = run(nested_file, images[:1].permute(0, 2, 3, 1).numpy())
    with torch.no_grad():
        wanted = nested_outputs(images[:1])
    assert sorted(outputs) == ["output_0", "output_1", "output_2"]
    np.testing.assert_allclose(outputs["output_0"], wanted["scores"].numpy(), atol=TOLERANCE)
    np.testing.assert_allclose(outputs["output_1"], wanted["extra"][1].permute(0, 2, 3, 1).numpy(), atol=TOLERANCE)
    np.testing.assert_allclose(outputs["output_2"], wanted["aux"].numpy(), atol=TOLERANCE)


def test_layout_can_be_left_alone(
    dense_map: nn.Module, images: Tensor, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    export_tflite(dense_map, images[:1], folder / "map.tflite", is_channels_last=False)
    printed = capfd.readouterr()
    (output,) = run(folder / "map.tflite", images[:1].numpy()).values()
    with torch.no_grad():
        np.testing.assert_allclose(output, dense_map(images[:1]).numpy(), atol=TOLERANCE)
    assert printed == ("", "")


def test_same_weights_give_same_bytes_without_paths(
    nested_outputs: nn.Module, nested_file: Path, images: Tensor, folder: Path
) -> None:
    environment = dict(os.environ)
    export_tflite(nested_outputs, images[1:2], folder / "again.tflite", is_channels_last=True)
    data = nested_file.read_bytes()
    assert data == (folder / "again.tflite").read_bytes()
    for path in (str(Path(__file__).parents[3]), str(Path.home()), str(folder), "site-packages"):
        assert path.encode() not in data
    assert dict(os.environ) == environment


class _Lists(nn.Module):
    """Two lists, whose modules have the same numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.ModuleList([nn.Conv2d(3, 3, k), nn.Conv2d(3, 3, k)]) for k in (1, 3))

    def forward(self, x: Tensor) -> Tensor:
        for part in (*self.first, *self.second):
            x = part(x)
        return x


@pytest.mark.parametrize("is_channels_last", [True, False])
def test_tensors_are_named_by_the_whole_names_of_modules(images: Tensor, folder: Path, is_channels_last: bool) -> None:
    from ai_edge_litert.interpreter import Interpreter

    path = folder / "lists.tflite"
    export_tflite(_Lists().eval(), images[:1], path, is_channels_last=is_channels_last)
    interpreter = Interpreter(str(path))
    interpreter.allocate_tensors()
    weights = [each["name"] for each in interpreter.get_tensor_details() if list(each["shape"][::3]) == [3, 3]]
    names = {tflite_layer_name([name], 0) for name in weights}
    assert {"first.0", "first.1", "second.0", "second.1"} <= names


def test_data_dependent_control_flow_is_refused(data_dependent: nn.Module, images: Tensor, folder: Path) -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"to TFLite: .*decides by a value .*conftest.py, line \d+: return x if "
    ):
        export_tflite(data_dependent, images[:1], folder / "no.tflite", is_channels_last=True)
    assert not (folder / "no.tflite").exists()


def test_channels_last_needs_images(classifier: nn.Module, folder: Path) -> None:
    with pytest.raises(UsageError, match=r"4-D input .* got shape \(1, 3\)"):
        export_tflite(classifier, torch.zeros(1, 3), folder / "no.tflite", is_channels_last=True)


def test_missing_exporter_says_how_to_install_it(
    classifier: nn.Module, images: Tensor, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "litert_torch", None)
    with pytest.raises(ToolError, match=r"pip install 'sepdeploy\[tflite\]'.*--formats onnx"):
        export_tflite(classifier, images[:1], folder / "no.tflite", is_channels_last=True)


class Viewed(nn.Module):
    """Flattens with `view`, which a channels-last tensor does not allow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.linear = nn.Linear(8 * 64, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.relu(self.conv(x)).view(x.size(0), -1))


def test_network_that_flattens_with_view_exports_channels_last(tmp_path):
    network, x = Viewed().eval(), torch.randn(1, 3, 8, 8)
    export_tflite(network, x, tmp_path / "v.tflite", is_channels_last=True)
    (found,) = run(tmp_path / "v.tflite", x.permute(0, 2, 3, 1).numpy()).values()
    np.testing.assert_allclose(found, network(x).detach().numpy(), atol=TOLERANCE)


class Awkward(nn.Module):
    """What litert-torch cannot write down as it is, or writes down wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Sequential(
            nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1),  # fails
            nn.ConvTranspose2d(4, 4, 4, stride=2, padding=1, output_padding=1),  # the last row would be zeros
            nn.ConvTranspose2d(4, 2, (3, 4), stride=(1, 2), padding=(1, 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        return (y.view(1, 1, 2, *y.shape[2:]) * 2) ** 2  # as YOLOv5 does: POW fails in five dimensions


def test_awkward_operators_compute_what_pytorch_computes(tmp_path):
    network, x = Awkward().eval(), torch.randn(1, 3, 4, 3)
    export_tflite(network, x, tmp_path / "net.tflite", is_channels_last=True)
    (output,) = run(tmp_path / "net.tflite", x.permute(0, 2, 3, 1).numpy()).values()
    with torch.no_grad():
        np.testing.assert_allclose(output, network(x).numpy(), atol=TOLERANCE, rtol=TOLERANCE)


def test_the_first_import_of_the_converter_is_quiet_too(folder: Path) -> None:
    code = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from sepdeploy.export.tflite import export_tflite\n"
        "export_tflite(torch.nn.Conv2d(3, 4, 3).eval(), torch.zeros(1, 3, 8, 8), Path(sys.argv[1]),"
        " is_channels_last=False)"
    )
    path = folder / "fresh.tflite"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=120)
    assert path.is_file()
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_operators_without_a_kernel_are_named(tmp_path):
    class Top(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1).topk(2)[0]

    export_tflite(Top(), torch.rand(1, 3, 4, 4), tmp_path / "top.tflite", is_channels_last=True)
    with pytest.raises(UsageError, match=r"no kernel for STABLEHLO_SORT; .*--formats onnx"):
        LitertSession(tmp_path / "top.tflite")
