"""Computes in int8 what the quantizer leaves in float between int8 tensors, though LiteRT has an int8 kernel for it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

__all__ = ["join_int8"]

_KERNELS: Mapping[str, int] = MappingProxyType({"LEAKY_RELU": 2})
"""Operator whose kernel takes int8 and returns it in any scale -> the version of it that does.

ABS, EXP and LOG have such kernels too, which take 1.2 to 5 times as long as the detour through float.
"""


def join_int8(data: bytes) -> tuple[bytes, int]:
    """Take away the DEQUANTIZE before and the QUANTIZE behind an operator that can do without.

    ai-edge-quantizer 0.10 knows no leaky ReLU: each would be two conversions and a float operator, which NPUs leave to
    the CPU.

    Args:
        data: A TFLite file, quantized.

    Returns:
        The file, and how many operators are in int8 now; the same bytes if none.
    """
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model_from_bytearray(bytearray(data))
    joined = 0
    for graph in model.subgraphs:
        int8 = {i for i, tensor in enumerate(graph.tensors) if tensor.type == schema.TensorType.INT8}
        for op in list(graph.operators):
            version = _KERNELS.get(_name(model, op))
            if version is None:
                continue
            before = next((each for each in graph.operators if op.inputs[0] in each.outputs), None)
            readers = [each for each in graph.operators if op.outputs[0] in each.inputs]
            after = [each for each in readers if _name(model, each) == "QUANTIZE" and each.outputs[0] in int8]
            is_read_in_float = any(_name(model, each) not in ("QUANTIZE", *_KERNELS) for each in readers)
            if before is None or before.inputs[0] not in int8 or _name(model, before) != "DEQUANTIZE":
                continue
            if len(after) != 1 or is_read_in_float or op.outputs[0] in graph.outputs:
                continue
            _join(graph, op, before, after[0])
            code = model.operatorCodes[op.opcodeIndex]
            code.version = max(code.version, version)
            joined += 1
        read = {tensor for op in graph.operators for tensor in op.inputs} | set(graph.outputs)
        graph.operators = [op for op in graph.operators if _name(model, op) != "DEQUANTIZE" or op.outputs[0] in read]
    return (bytes(flatbuffer_utils.convert_object_to_bytearray(model)), joined) if joined else (data, 0)


def _join(graph: Any, op: Any, before: Any, after: Any) -> None:
    """Let `op` read what `before` dequantizes and return what `after` makes, which turns into the way back to float."""
    returned, result = op.outputs[0], after.outputs[0]
    # As of all activations, the name is that of the float file.
    graph.tensors[result].name, graph.tensors[returned].name = graph.tensors[returned].name, graph.tensors[result].name
    op.inputs, op.outputs = [before.inputs[0]], [result]
    after.opcodeIndex, after.builtinOptionsType, after.builtinOptions = (
        before.opcodeIndex,
        before.builtinOptionsType,
        before.builtinOptions,
    )
    after.inputs, after.outputs = [result], [returned]
    graph.operators = [each for each in graph.operators if each is not after]
    graph.operators.insert(next(i for i, each in enumerate(graph.operators) if each is op) + 1, after)


def _name(model: Any, operator: Any) -> str:
    from ai_edge_litert.tools import flatbuffer_utils

    name: str = flatbuffer_utils.opcode_to_name(model, operator.opcodeIndex)
    return name
