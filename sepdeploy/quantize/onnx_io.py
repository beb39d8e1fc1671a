"""The type that an int8 ONNX file takes and returns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    import onnx

__all__ = ["set_io_type"]


def set_io_type(model: onnx.ModelProto, io: Literal["float32", "int8", "uint8"]) -> None:
    """Let the file take and return 8-bit codes in place of floats; in place.

    The quantization of the input and the dequantization of the outputs are left to the caller. What the codes mean
    stays in the file: the input is read by a DequantizeLinear, each output is written by a QuantizeLinear, whose scale
    and zero point are the tensor's. Outputs that no operator quantizes stay float32.

    Args:
        model: QDQ, with uint8 activations.
        io: 'float32' leaves it as it is.
    """
    if io == "float32":
        return
    graph = model.graph
    _set_input(graph, io)
    ends = {output.name: output for output in graph.output}
    for output in ends.values():
        _set_output(graph, output, io)
    for output in graph.output:  # a tensor that is returned twice is listed twice
        output.CopyFrom(ends[output.name])


def _set_input(graph: onnx.GraphProto, io: str) -> None:
    from onnx import helper

    value = graph.input[0]
    readers = [node for node in graph.node if value.name in node.input]
    if not readers or any(node.op_type != "QuantizeLinear" for node in readers):
        return
    first = readers[0]
    _, scale, zero_point = first.input
    codes = [node.output[0] for node in readers]
    if io == "uint8":
        for node in [each for each in graph.node if any(code in each.input for code in codes)]:
            for place, name in enumerate(node.input):
                if name in codes:
                    node.input[place] = value.name
        for node in readers:
            graph.node.remove(node)
    else:
        floats = f"{value.name}_float"
        shifted = _shifted_zero_point(graph, zero_point)
        for node in readers:
            node.input[0] = floats
        graph.node.insert(0, helper.make_node("DequantizeLinear", [value.name, scale, shifted], [floats]))
    _set_type(value, io)


def _set_output(graph: onnx.GraphProto, output: onnx.ValueInfoProto, io: str) -> None:
    from onnx import helper

    makers = {name: node for node in graph.node for name in node.output}
    readers = [node for node in graph.node if output.name in node.input]
    maker = makers.get(output.name)
    floats = f"{output.name}_float"
    if maker is not None and maker.op_type == "Identity":  # of a tensor that is returned twice, or that is the input
        copy, floats = maker, maker.input[0]
        maker = makers.get(floats)
    else:
        copy = None
    if maker is None or maker.op_type != "DequantizeLinear":
        return
    codes, scale, zero_point = maker.input
    if codes in makers and makers[codes].op_type != "QuantizeLinear":
        return
    if copy is not None:
        graph.node.remove(copy)
    _rename(graph, output.name, floats)
    is_end = any(codes == end.name for end in (*graph.input, *graph.output))
    if io == "uint8" and copy is None and not is_end:
        _rename(graph, codes, output.name)
        if not readers:
            graph.node.remove(maker)
    else:
        target = zero_point if io == "uint8" else _shifted_zero_point(graph, zero_point)
        graph.node.append(helper.make_node("QuantizeLinear", [floats, scale, target], [output.name]))
    _set_type(output, io)


def _rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    """Give a tensor another name where it is made and wherever it is read."""
    for node in graph.node:
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                if name == old:
                    names[place] = new


def _shifted_zero_point(graph: onnx.GraphProto, name: str) -> str:
    """Name of a constant: the int8 zero point for a uint8 one."""
    from onnx import numpy_helper

    shifted = f"{name}_int8"
    if all(initializer.name != shifted for initializer in graph.initializer):
        given = next(initializer for initializer in graph.initializer if initializer.name == name)
        value = numpy_helper.to_array(given).astype(np.int16) - 128
        graph.initializer.append(numpy_helper.from_array(value.astype(np.int8), shifted))
    return shifted


def _set_type(value: onnx.ValueInfoProto, io: str) -> None:
    from onnx import TensorProto

    value.type.tensor_type.elem_type = TensorProto.UINT8 if io == "uint8" else TensorProto.INT8
