from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sepdeploy.errors import ToolError, UnsupportedModelError
from sepdeploy.export.onnx import OPSET, export_onnx

# float32 rounding in another order of summation, over at most a few hundred terms of size 1
TOLERANCE = 1e-4


def run(path: Path, images: Tensor) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    batches = [session.run(None, {"input": images[i : i + 1].numpy()}) for i in range(len(images))]
    return [np.concatenate(outputs) for outputs in zip(*batches, strict=True)]


def expected(model: nn.Module, images: Tensor) -> list[np.ndarray]:
    with torch.no_grad():
        return [leaf.numpy() for leaf in tree_leaves(model(images)) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize(
    ("name", "output_names"),
    [
        ("classifier", ["output"]),
        ("nested_outputs", ["output_0", "output_1", "output_2"]),
        ("dense_map", ["output"]),
    ],
)
def test_file_computes_what_the_network_computes(
    request: pytest.FixtureRequest, images: Tensor, tmp_path: Path, name: str, output_names: list[str]
) -> None:
    model = request.getfixturevalue(name)
    path = tmp_path / "net.onnx"
    export_onnx(model, images[:1], path)

    file = onnx.load(str(path))
    assert [value.name for value in file.graph.input] == ["input"]
    assert [value.name for value in file.graph.output] == output_names
    assert [(opset.domain, opset.version) for opset in file.opset_import] == [("", OPSET)]
    wanted, got = expected(model, images), run(path, images)
    assert [array.shape for array in got] == [array.shape for array in wanted]
    for one, other in zip(wanted, got, strict=True):
        np.testing.assert_allclose(other, one, atol=TOLERANCE, rtol=TOLERANCE)


def test_batch_norm_is_folded(classifier: nn.Module, images: Tensor, tmp_path: Path) -> None:
    export_onnx(classifier, images[:1], tmp_path / "net.onnx")
    op_types = {node.op_type for node in onnx.load(str(tmp_path / "net.onnx")).graph.node}
    assert "Conv" in op_types
    assert "BatchNormalization" not in op_types


def test_same_weights_give_same_bytes_without_paths(classifier: nn.Module, images: Tensor, tmp_path: Path) -> None:
    export_onnx(classifier, images[:1], tmp_path / "first.onnx")
    export_onnx(classifier, images[1:2], tmp_path / "second.onnx")
    data = (tmp_path / "first.onnx").read_bytes()
    assert data == (tmp_path / "second.onnx").read_bytes()
    for path in (str(Path(__file__).parents[3]), str(Path.home()), str(tmp_path), "site-packages", ".py"):
        assert path.encode() not in data
    file = onnx.load_from_string(data)
    for part in (file, file.graph, *file.graph.node, *file.graph.initializer, *file.graph.value_info):
        assert not part.doc_string
        assert not getattr(part, "metadata_props", ())


def test_network_is_left_as_it_was(classifier: nn.Module, images: Tensor, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    classifier.stem.train()
    try:
        export_onnx(classifier, images[:1], tmp_path / "net.onnx")
        assert {name for name, module in classifier.named_modules() if module.training} == {
            "stem",
            "stem.0",
            "stem.1",
            "stem.2",
        }
    finally:
        classifier.eval()
    after = classifier.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_prints_nothing(
    dense_map: nn.Module, images: Tensor, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    export_onnx(dense_map, images[:1], tmp_path / "net.onnx")
    assert capfd.readouterr() == ("", "")


def test_data_dependent_control_flow_is_refused(data_dependent: nn.Module, images: Tensor, tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"to ONNX: .*decides by a value .*conftest.py, line \d+: return x if "
    ):
        export_onnx(data_dependent, images[:1], tmp_path / "net.onnx")
    assert not (tmp_path / "net.onnx").exists()


def test_outputs_of_unknown_size_are_refused(images: Tensor, tmp_path: Path) -> None:
    class Selects(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[x > 0]

    with pytest.raises(UnsupportedModelError, match="depends on the values of its input"):
        export_onnx(Selects(), images[:1], tmp_path / "net.onnx")


def test_outputs_without_a_tensor_are_refused(images: Tensor, tmp_path: Path) -> None:
    class Names(nn.Module):
        def forward(self, x: Tensor) -> dict[str, str]:
            return {"label": "cat"}

    with pytest.raises(UnsupportedModelError, match="returns dict without a tensor"):
        export_onnx(Names(), images[:1], tmp_path / "net.onnx")


def test_wrong_input_shape_is_named(classifier: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"shape \(1, 4, 8, 8\).*4 channels"):
        export_onnx(classifier, torch.zeros(1, 4, 8, 8), tmp_path / "net.onnx")


def test_networks_of_2_gib_are_refused(images: Tensor, tmp_path: Path) -> None:
    huge = nn.Linear(2**15, 2**14, device="meta")  # 2 GiB of float32, none of it allocated
    with pytest.raises(UnsupportedModelError, match=r"2\.0 GiB"):
        export_onnx(huge, images[:1], tmp_path / "net.onnx")


def test_failing_simplifier_is_a_tool_error(
    dense_map: nn.Module, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(model: onnx.ModelProto) -> None:
        raise RuntimeError("no such pass\nand a page of advice")

    monkeypatch.setattr("onnxsim.simplify", fail)
    with pytest.raises(ToolError, match=r"onnxsim failed .*: no such pass$"):
        export_onnx(dense_map, images[:1], tmp_path / "net.onnx")
