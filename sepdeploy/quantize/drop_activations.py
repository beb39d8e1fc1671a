"""Drops fused activations from int8 TFLite files that saturation implies: the same bytes out, less for an NPU to do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

__all__ = ["drop_redundant_activations"]

_BOUNDS: Mapping[str, tuple[float, float]] = MappingProxyType(
    {"RELU": (0.0, math.inf), "RELU6": (0.0, 6.0), "RELU_N1_TO_1": (-1.0, 1.0)}
)
"""Fused activation -> the real numbers that it clamps to."""

_EXACT = 0.25
"""A bound this near to a step's, in steps, is that step: kernels round it to the nearest."""


def drop_redundant_activations(data: bytes) -> tuple[bytes, int]:
    """Take away fused activations whose bounds are those of the output's 8 bits, or lie beyond them.

    Every kernel clamps its result to what the output's type holds. Where that is no more than the activation lets
    through (ReLU with the zero point at the lowest code; ReLU6 with the highest code at 6 or below besides), the
    activation changes nothing. Vela turns one that is fused into a grouped convolution into a pass of its own.

    Args:
        data: A TFLite file, quantized.

    Returns:
        The file, bit-exact in its outputs, and how many activations were dropped; the same bytes if none.
    """
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model_from_bytearray(bytearray(data))
    names = {code: name for name, code in vars(schema.ActivationFunctionType).items() if name in _BOUNDS}
    limits = {schema.TensorType.INT8: (-128, 127), schema.TensorType.UINT8: (0, 255)}
    dropped = 0
    for graph in model.subgraphs:
        for operator in graph.operators:
            name = names.get(getattr(operator.builtinOptions, "fusedActivationFunction", None))
            output = graph.tensors[operator.outputs[0]] if operator.outputs is not None else None
            if name is None or output is None or output.type not in limits:
                continue
            if _is_implied(_BOUNDS[name], output.quantization, limits[output.type]):
                operator.builtinOptions.fusedActivationFunction = schema.ActivationFunctionType.NONE
                dropped += 1
    return (bytes(flatbuffer_utils.convert_object_to_bytearray(model)), dropped) if dropped else (data, 0)


def _is_implied(bounds: tuple[float, float], quantization: Any, limits: tuple[int, int]) -> bool:
    """Whether no code of the output lies outside of the bounds."""
    if quantization is None or quantization.scale is None or quantization.zeroPoint is None:
        return False
    if len(quantization.scale) != 1 or len(quantization.zeroPoint) != 1:
        return False
    scale, zero_point = float(quantization.scale[0]), int(quantization.zeroPoint[0])
    low, high = (zero_point + bound / scale for bound in bounds)
    return low <= limits[0] + _EXACT and high >= limits[1] - _EXACT
