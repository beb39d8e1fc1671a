from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from sepdeploy.core.onnx_steps import output_steps


def written(path: Path, nodes: list[onnx.NodeProto], outputs: dict[str, int], **scales: object) -> Path:
    ends = [helper.make_tensor_value_info(name, kind, [1, 2]) for name, kind in outputs.items()]
    constants = [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in scales.items()]
    start = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2])]
    graph = helper.make_graph(nodes, "net", start, ends, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), path)
    return path


def test_each_output_has_the_step_that_it_comes_from(tmp_path: Path) -> None:
    node = helper.make_node
    nodes = [
        node("QuantizeLinear", ["x", "coarse"], ["codes"]),
        node("DequantizeLinear", ["codes", "coarse"], ["values"]),
        node("Identity", ["values"], ["again"]),
        node("Identity", ["again"], ["once_more"]),
        node("Softmax", ["values"], ["probabilities"]),
        node("Identity", ["x"], ["input"]),
        node("Constant", [], ["fine"], value=numpy_helper.from_array(np.float32(0.125), "fine")),
        node("DequantizeLinear", ["codes", "fine"], ["finer"]),
        node("DequantizeLinear", ["codes", "each"], ["by_channel"], axis=1),
        node("Mul", ["coarse", "fine"], ["computed"]),
        node("DequantizeLinear", ["codes", "computed"], ["unknown"]),
    ]
    real = ("once_more", "probabilities", "values", "input", "finer", "by_channel", "unknown")
    outputs = {"codes": TensorProto.UINT8, **dict.fromkeys(real, TensorProto.FLOAT)}
    path = written(tmp_path / "net.onnx", nodes, outputs, coarse=0.5, each=[0.25, 0.75])
    assert output_steps(path) == [0.5, 0.5, None, 0.5, None, 0.125, 0.75, None]
