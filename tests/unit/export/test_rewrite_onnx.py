from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from sepdeploy.export.onnx import OPSET, export_onnx
from sepdeploy.export.rewrite_onnx import rewrite_for_int8
from sepdeploy.models.digits import digits_cnn
from sepdeploy.models.resnet_cifar import resnet20

TOLERANCE = 1e-6  # means of 35 values of size 1, summed in another order


def one_node(
    op_type: str, constant: np.ndarray, shape: tuple[int, ...], output_shape: tuple[int, ...], **attributes: int
) -> onnx.ModelProto:
    """A network of one node that reads an input of `shape` and a constant."""
    graph = helper.make_graph(
        [helper.make_node(op_type, ["x", "constant"], ["y"], **attributes)],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, output_shape)],
        [numpy_helper.from_array(constant.astype(np.int64), "constant")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # the rewrite leaves unread constants to the simplifier
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x})
    return y


def op_types(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize("axes", [(2, 3), (3, 2), (-1, -2), (2, -1)])
@pytest.mark.parametrize(
    ("keepdims", "output_shape", "wanted"),
    [(1, (2, 6, 1, 1), ["GlobalAveragePool"]), (0, (2, 6), ["GlobalAveragePool", "Flatten"])],
)
def test_mean_over_the_image_becomes_a_pool(
    axes: tuple[int, ...], keepdims: int, output_shape: tuple[int, ...], wanted: list[str]
) -> None:
    model = one_node("ReduceMean", np.array(axes), (2, 6, 5, 7), output_shape, keepdims=keepdims)
    x = np.random.default_rng(0).standard_normal((2, 6, 5, 7)).astype(np.float32)
    before = run(model, x)
    assert rewrite_for_int8(model)
    assert op_types(model) == wanted
    np.testing.assert_allclose(run(model, x), before, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("shape", "axes", "output_shape"),
    [
        ((2, 6, 5, 7), (1,), (2, 1, 5, 7)),
        ((2, 6, 5, 7), (3,), (2, 6, 5, 1)),
        ((2, 6, 5, 7), (1, 2, 3), (2, 1, 1, 1)),
        ((2, 6, 5, 7), (1, 2), (2, 1, 1, 7)),
        ((2, 6, 5, 7, 3), (2, 3), (2, 6, 1, 1, 3)),
        ((2, 6, 5), (-2, -1), (2, 1, 1)),
    ],
)
def test_other_means_stay(shape: tuple[int, ...], axes: tuple[int, ...], output_shape: tuple[int, ...]) -> None:
    model = one_node("ReduceMean", np.array(axes), shape, output_shape, keepdims=1)
    before = model.SerializeToString()
    assert not rewrite_for_int8(model)
    assert model.SerializeToString() == before


@pytest.mark.parametrize(
    ("indices", "axis", "output_shape"),
    [
        (np.arange(6), 1, (2, 6, 5)),
        (np.arange(5), -1, (2, 6, 5)),
        (np.arange(6).reshape(3, 2, 1), 1, (2, 3, 2, 1, 5)),
    ],
)
def test_gather_of_everything_in_order_becomes_a_reshape(
    indices: np.ndarray, axis: int, output_shape: tuple[int, ...]
) -> None:
    model = one_node("Gather", indices, (2, 6, 5), output_shape, axis=axis)
    x = np.random.default_rng(0).standard_normal((2, 6, 5)).astype(np.float32)
    before = run(model, x)
    assert rewrite_for_int8(model)
    assert op_types(model) == ["Reshape"]
    np.testing.assert_array_equal(run(model, x), before)


@pytest.mark.parametrize("indices", [[1, 0, 2, 3, 4, 5], [0, 1, 2], [0, 1, 2, 3, 4, 5, 5], [-6, -5, -4, -3, -2, -1]])
def test_gathers_that_move_or_pick_stay(indices: list[int]) -> None:
    model = one_node("Gather", np.array(indices), (2, 6, 5), (2, len(indices), 5), axis=1)
    assert not rewrite_for_int8(model)
    assert op_types(model) == ["Gather"]


@pytest.mark.parametrize(
    ("net", "shape"), [(digits_cnn, (1, 1, 32, 32)), (resnet20, (1, 3, 32, 32))], ids=["digits", "resnet20"]
)
def test_own_networks_export_without_float_only_operators(net, shape: tuple[int, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: nn.Module = net().eval()
    images = torch.randn(shape)
    export_onnx(model, images, tmp_path / "net.onnx")
    file = onnx.load(str(tmp_path / "net.onnx"))
    assert op_types(file).count("GlobalAveragePool") == 1
    assert not {"ReduceMean", "Gather"} & set(op_types(file))
    assert op_types(file).count("Reshape") == 1
    read = {name for node in file.graph.node for name in node.input}
    assert {constant.name for constant in file.graph.initializer} <= read
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    (scores,) = session.run(None, {"input": images.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(scores, model(images).numpy(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("exponent", "wanted"), [(2, "Mul"), (3, "Pow")])
def test_squares_become_products(exponent: int, wanted: str) -> None:
    model = one_node("Pow", np.array(exponent), (1, 2, 3, 4, 5), (1, 2, 3, 4, 5))
    x = np.random.default_rng(0).standard_normal((1, 2, 3, 4, 5)).astype(np.float32)
    before = run(model, x)
    assert rewrite_for_int8(model) == (wanted == "Mul")
    assert op_types(model) == [wanted]
    np.testing.assert_allclose(run(model, x), before, atol=TOLERANCE, rtol=TOLERANCE)
