"""On files of LiteRT: the same codes out before and after, and nothing dropped that does something."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("litert_torch", reason="needs sepdeploy[tflite]")

from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from ai_edge_litert.tools import flatbuffer_utils

from sepdeploy.export.tflite import export_tflite
from sepdeploy.quantize import tflite_int8
from sepdeploy.quantize.drop_activations import drop_redundant_activations

NONE, RELU, RELU6, TO_1 = (
    getattr(schema.ActivationFunctionType, name) for name in ("NONE", "RELU", "RELU6", "RELU_N1_TO_1")
)
SIZE = 10


class Net(nn.Module):
    """ReLU on a dense, a depthwise and a grouped convolution and on an addition, ReLU6 within its range and beyond."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.c = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.small = nn.Conv2d(8, 8, 1)
        self.large = nn.Conv2d(8, 8, 1)
        nn.init.constant_(self.large.bias, 9.0)  # so that ReLU6 cuts off
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.a(x))
        x = torch.relu(x + torch.relu(self.c(torch.relu(self.b(x)))))
        x = nn.functional.relu6(self.small(x)) + nn.functional.relu6(self.large(x))
        return self.head(x.mean((2, 3)))


def images(count: int) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.standard_normal((1, SIZE, SIZE, 3)).astype(np.float32) for _ in range(count)]


@pytest.fixture(scope="module")
def float_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("relu") / "net.tflite"
    export_tflite(Net().eval(), torch.randn(1, 3, SIZE, SIZE), path, is_channels_last=True)
    return path


@pytest.fixture(scope="module")
def untouched(float_file: Path) -> bytes:
    """The int8 file as the quantizer leaves it."""
    path = float_file.with_name("untouched.tflite")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tflite_int8, "drop_redundant_activations", lambda data: (data, 0))
        tflite_int8.quantize_tflite(float_file, path, images(6))
    return path.read_bytes()


def activations(data: bytes) -> list[int]:
    (graph,) = flatbuffer_utils.read_model_from_bytearray(bytearray(data)).subgraphs
    found = [getattr(operator.builtinOptions, "fusedActivationFunction", NONE) for operator in graph.operators]
    return sorted(activation for activation in found if activation != NONE)


def codes(data: bytes, *, with_xnnpack: bool) -> np.ndarray:
    """All int8 outputs for random codes."""
    resolver = OpResolverType.AUTO if with_xnnpack else OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = Interpreter(model_content=data, experimental_op_resolver_type=resolver)
    interpreter.allocate_tensors()
    generator = np.random.default_rng(1)
    found = []
    for _ in range(20):
        image = generator.integers(-128, 128, (1, SIZE, SIZE, 3), dtype=np.int8)
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], image)
        interpreter.invoke()
        found.append(interpreter.get_tensor(interpreter.get_output_details()[0]["index"]).copy())
    return np.stack(found)


@pytest.mark.parametrize("with_xnnpack", [False, True])
def test_outputs_are_the_same_codes(untouched: bytes, with_xnnpack: bool) -> None:
    changed, dropped = drop_redundant_activations(untouched)
    assert dropped == 6
    assert activations(untouched) == [RELU] * 4 + [RELU6] * 2
    assert activations(changed) == []
    before = codes(untouched, with_xnnpack=with_xnnpack)
    assert before.std() > 1
    np.testing.assert_array_equal(codes(changed, with_xnnpack=with_xnnpack), before)


def edited(data: bytes, edit: Any) -> bytes:
    """The file with `edit` applied to the output tensors of operators with an activation."""
    model = flatbuffer_utils.read_model_from_bytearray(bytearray(data))
    (graph,) = model.subgraphs
    for operator in graph.operators:
        if getattr(operator.builtinOptions, "fusedActivationFunction", NONE) != NONE:
            edit(operator.builtinOptions, graph.tensors[operator.outputs[0]])
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def raise_zero_point(options: Any, tensor: Any) -> None:
    tensor.quantization.zeroPoint = [-127]  # one code below zero


def widen_relu6(options: Any, tensor: Any) -> None:
    options.fusedActivationFunction = RELU6
    tensor.quantization.scale = [6.0 / 254]  # one code above 6


def bound_by_1(options: Any, tensor: Any) -> None:
    options.fusedActivationFunction = TO_1
    tensor.quantization.scale = [2.0 / 255]  # to 2


def forget_scale(options: Any, tensor: Any) -> None:
    tensor.quantization = None


@pytest.mark.parametrize("edit", [raise_zero_point, widen_relu6, bound_by_1, forget_scale])
def test_what_does_something_stays(untouched: bytes, edit: Any) -> None:
    data = edited(untouched, edit)
    assert drop_redundant_activations(data) == (data, 0)


def test_both_bounds_are_looked_at(untouched: bytes) -> None:
    def narrow(options: Any, tensor: Any) -> None:
        options.fusedActivationFunction = RELU6
        tensor.quantization.scale = [6.0 / 255]

    assert drop_redundant_activations(edited(untouched, narrow))[1] == 6


def test_float_files_are_left_alone(float_file: Path) -> None:
    data = float_file.read_bytes()
    assert activations(data) != []
    assert drop_redundant_activations(data) == (data, 0)


def test_int8_files_come_without_them(float_file: Path, tmp_path: Path) -> None:
    tflite_int8.quantize_tflite(float_file, tmp_path / "int8.tflite", images(6))
    assert activations((tmp_path / "int8.tflite").read_bytes()) == []
