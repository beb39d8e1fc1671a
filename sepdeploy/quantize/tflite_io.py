"""The type that an int8 TFLite file takes and returns."""

from __future__ import annotations

import copy
from typing import Any, Literal

import numpy as np

__all__ = ["with_io_type"]


def with_io_type(data: bytes, io: Literal["float32", "int8", "uint8"]) -> bytes:
    """Bytes of an int8 file that takes and returns another type, by an operator at each end that converts.

    Args:
        data: A file whose input and outputs are int8.
        io: 'int8' leaves it as it is.
    """
    if io == "int8":
        return data
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model_from_bytearray(bytearray(data))
    graph = model.subgraphs[0]
    operators = list(graph.operators)
    inputs, outputs = (_added_tensors(graph, ends, io, schema) for ends in (graph.inputs, graph.outputs))
    for index, added in inputs.items():
        operators.insert(0, _conversion(model, added, index, io, schema, is_input=True))
    operators += [_conversion(model, index, added, io, schema, is_input=False) for index, added in outputs.items()]
    graph.operators = operators
    graph.inputs = np.array([inputs.get(each, each) for each in graph.inputs], np.int32)
    graph.outputs = np.array([outputs.get(each, each) for each in graph.outputs], np.int32)
    for signature in model.signatureDefs or []:
        for ends, added_tensors in ((signature.inputs, inputs), (signature.outputs, outputs)):
            for end in ends or []:
                end.tensorIndex = added_tensors.get(end.tensorIndex, end.tensorIndex)
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def _added_tensors(graph: Any, ends: Any, io: str, schema: Any) -> dict[int, int]:
    """Each int8 tensor at an end of the file, once -> a new one in the type that the file is to have there."""
    found = dict.fromkeys(int(each) for each in ends if graph.tensors[each].type == schema.TensorType.INT8)
    return {index: _add_tensor(graph, graph.tensors[index], io, schema) for index in found}


def _add_tensor(graph: Any, tensor: Any, io: str, schema: Any) -> int:
    """Index of a new tensor like `tensor`, in the type that the file is to have."""
    added = copy.deepcopy(tensor)
    added.name = bytes(tensor.name) + f"_{io}".encode()
    if io == "float32":
        added.type, added.quantization = schema.TensorType.FLOAT32, None
    else:
        added.type = schema.TensorType.UINT8
        added.quantization.zeroPoint = np.asarray(tensor.quantization.zeroPoint) + 128
    graph.tensors.append(added)
    return len(graph.tensors) - 1


def _conversion(model: Any, source: int, target: int, io: str, schema: Any, *, is_input: bool) -> Any:
    is_dequantizing = io == "float32" and not is_input
    code = schema.BuiltinOperator.DEQUANTIZE if is_dequantizing else schema.BuiltinOperator.QUANTIZE
    operator = schema.OperatorT()
    operator.opcodeIndex = _code_index(model, code, schema)
    operator.inputs, operator.outputs = np.array([source], np.int32), np.array([target], np.int32)
    return operator


def _code_index(model: Any, code: int, schema: Any) -> int:
    for index, known in enumerate(model.operatorCodes):
        if max(known.builtinCode, known.deprecatedBuiltinCode) == code:
            return index
    added = schema.OperatorCodeT()
    added.builtinCode, added.deprecatedBuiltinCode, added.version = code, min(code, 127), 1
    model.operatorCodes.append(added)
    return len(model.operatorCodes) - 1
