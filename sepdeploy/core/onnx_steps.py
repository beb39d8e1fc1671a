"""Which outputs of an ONNX file are quantized, and how finely."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

__all__ = ["output_steps"]


def output_steps(path: Path) -> list[float | None]:
    """Step of the quantization that each output of an ONNX file comes from, in order; None where it comes from none.

    A step is what one code more means: the scale of the QuantizeLinear or DequantizeLinear that writes the output,
    directly or through Identity, as where a tensor is returned twice. Of several scales it is the largest.
    """
    import onnx

    graph = onnx.load(str(path)).graph
    makers = {name: node for node in graph.node for name in node.output}
    constants = {each.name: each for each in graph.initializer}
    # Files of others may hold a scale in an operator.
    constants |= {
        node.output[0]: attribute.t
        for node in graph.node
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.name == "value"
    }
    return [_step(makers.get(output.name), makers, constants) for output in graph.output]


def _step(
    maker: onnx.NodeProto | None, makers: dict[str, onnx.NodeProto], constants: dict[str, onnx.TensorProto]
) -> float | None:
    from onnx import numpy_helper

    while maker is not None and maker.op_type == "Identity":
        maker = makers.get(maker.input[0])
    if maker is None or maker.op_type not in ("QuantizeLinear", "DequantizeLinear"):
        return None
    scale = constants.get(maker.input[1])
    return None if scale is None else float(numpy_helper.to_array(scale).max())
