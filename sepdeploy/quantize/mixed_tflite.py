"""An int8 TFLite file with some layers in float, or with int8 weights only; all else as it was."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from sepdeploy.core.mixed import Arithmetic, is_within
from sepdeploy.core.quiet import quiet, silenced_native_stderr
from sepdeploy.errors import ToolError
from sepdeploy.quantize.drop_activations import drop_redundant_activations
from sepdeploy.quantize.int8_share import TfliteLayer, tflite_layers
from sepdeploy.quantize.join_int8 import join_int8
from sepdeploy.quantize.tflite_io import with_io_type

__all__ = ["mix_tflite"]

_OPERANDS: Mapping[str, tuple[int, int, int]] = MappingProxyType(
    {
        **dict.fromkeys(("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"), (0, 1, 2)),
        "TRANSPOSE_CONV": (2, 1, 3),
    }
)
"""Operator -> where its data, weights and bias are among its inputs."""


def mix_tflite(source: Path, int8: Path, destination: Path, kept: Mapping[str, Arithmetic]) -> frozenset[str]:
    """Write the int8 file with the layers in `kept` computed in float.

    The float file is quantized once more, with the ranges that the int8 file has and without those layers; the weights
    of the others are then those of `int8`, whatever they were made by. Input and outputs are of the types of `int8`.

    Operators without weights of which only such layers read the output are in float as well.

    Args:
        source: The float32 file that `int8` was quantized from.
        int8: A file whose tensors have the names of the float file's.
        destination: The file to write.
        kept: Layer of the network -> how it computes; '' stands for all.

    Returns:
        The layers in `kept` of which the file has no operator.

    Raises:
        ToolError: if the input or an output came out in another type.
    """
    from ai_edge_quantizer import quantizer

    layers = tflite_layers(source)
    found = {name: [layer for layer in layers if is_within(layer.name, name)] for name in kept}
    with quiet(), silenced_native_stderr():
        engine = quantizer.Quantizer(str(source), _recipe(source, found, kept))
        mixed = bytes(engine.quantize(_ranges(int8), enable_progress_report=False).quantized_model)
    data, _ = drop_redundant_activations(_with_weights_of(join_int8(mixed)[0], int8))
    data = with_io_type(data, _io_type(int8))
    if _end_types(data) != _end_types(int8.read_bytes()):
        raise ToolError("the mixed TFLite file takes or returns other types than the int8 file; leave out --mixed auto")
    destination.write_bytes(data)
    return frozenset(name for name, of_name in found.items() if not of_name)


def _end_types(data: bytes) -> list[int]:
    """Types of the inputs and of the outputs."""
    from ai_edge_litert.tools import flatbuffer_utils

    (graph, *_) = flatbuffer_utils.read_model_from_bytearray(bytearray(data)).subgraphs
    return [int(graph.tensors[tensor].type) for tensor in (*graph.inputs, *graph.outputs)]


def _io_type(int8: Path) -> Literal["float32", "int8", "uint8"]:
    """What the file takes and returns."""
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils

    (graph, *_) = flatbuffer_utils.read_model(str(int8)).subgraphs
    types: dict[int, Literal["float32", "uint8"]] = {
        schema.TensorType.FLOAT32: "float32",
        schema.TensorType.UINT8: "uint8",
    }
    return types.get(graph.tensors[graph.inputs[0]].type, "int8")


def _recipe(source: Path, found: Mapping[str, list[TfliteLayer]], kept: Mapping[str, Arithmetic]) -> Any:
    """All in int8 but the operators that return these tensors."""
    from ai_edge_litert.tools import flatbuffer_utils
    from ai_edge_quantizer import qtyping, recipe, recipe_manager
    from ai_edge_quantizer.algorithm_manager import AlgorithmName

    (graph, *_) = flatbuffer_utils.read_model(str(source)).subgraphs
    every = qtyping.TFLOperationName.ALL_SUPPORTED
    arithmetics = {layer.output: kept[name] for name, layers in found.items() for layer in layers}
    recipes = recipe_manager.RecipeManager()
    recipes.load_quantization_recipe(recipe.static_wi8_ai8())
    for output in (*arithmetics, *_feeding(graph, set(arithmetics), {layer.output for layer in tflite_layers(source)})):
        scope = f"^{re.escape(graph.tensors[output].name.decode())};$"  # as the quantizer ends it
        if arithmetics.get(output) is Arithmetic.WEIGHTS_ONLY:
            recipes.add_weight_only_config(scope, every, num_bits=8)
        else:
            recipes.add_quantization_config(scope, every, algorithm_key=AlgorithmName.NO_QUANTIZE)
        # What the file returns is in the scope of the operator that made it, and stays in int8.
        recipes.add_static_config(scope, qtyping.TFLOperationName.OUTPUT, 8, 8)
    return recipes.get_quantization_recipe()


def _feeding(graph: Any, in_float: set[int], layers: set[int]) -> list[int]:
    """Outputs of operators other than layers that only operators in float read, from back to front."""
    in_float = set(in_float)
    readers: dict[int, list[Any]] = {}
    for operator in graph.operators:
        for tensor in operator.inputs:
            readers.setdefault(tensor, []).append(operator)
    found = []
    for operator in reversed(graph.operators):
        output = operator.outputs[0]
        reading = readers.get(output, [])
        if output in layers or output in graph.outputs or not reading or len(operator.outputs) > 1:
            continue
        if all(in_float.intersection(reader.outputs) for reader in reading):
            in_float.add(output)
            found.append(output)
    return found


def _ranges(int8: Path) -> dict[str, Any]:
    """Name of each quantized activation -> the real numbers of its lowest and highest code."""
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils

    (graph, *_) = flatbuffer_utils.read_model(str(int8)).subgraphs
    computed = {output for operator in graph.operators for output in operator.outputs} | set(graph.inputs)
    limits = {schema.TensorType.INT8: (-128, 127), schema.TensorType.UINT8: (0, 255)}
    ranges = {}
    for i, tensor in enumerate(graph.tensors):
        quantization = tensor.quantization
        if tensor.type not in limits or quantization is None or quantization.scale is None:
            continue
        if i in computed and len(quantization.scale) == 1:
            scale, zero_point = np.float32(quantization.scale[0]), int(quantization.zeroPoint[0])
            low, high = ((code - zero_point) * scale for code in limits[tensor.type])
            # Without axes they fit constants of any rank that share the scale.
            ranges[tensor.name.decode()] = {"min": np.array(low, np.float32), "max": np.array(high, np.float32)}
    return ranges


def _with_weights_of(mixed: bytes, int8: Path) -> bytes:
    """The file with the integers, scales and zero points of every tensor that `int8` has in the same type."""
    from ai_edge_litert.tools import flatbuffer_utils

    original = flatbuffer_utils.read_model(str(int8))
    known = {tensor.name: tensor for tensor in original.subgraphs[0].tensors}
    model = flatbuffer_utils.read_model_from_bytearray(bytearray(mixed))
    for tensor in model.subgraphs[0].tensors:
        other = known.get(tensor.name)
        if other is None or other.type != tensor.type or list(other.shape) != list(tensor.shape):
            continue
        if other.quantization is None or other.quantization.scale is None:
            continue
        tensor.quantization.scale, tensor.quantization.zeroPoint = (
            other.quantization.scale,
            other.quantization.zeroPoint,
        )
        data = original.buffers[other.buffer].data
        if data is not None and model.buffers[tensor.buffer].data is not None:
            model.buffers[tensor.buffer].data = data
    _fit_biases(model)
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def _fit_biases(model: Any) -> None:
    """Count biases in steps of the input's scale times the weights': next to a float layer the input may have another.

    What a float layer returns is quantized once for all that read it, in the scale of the concatenation among them.
    """
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils

    (graph, *_) = model.subgraphs
    for operator in graph.operators:
        places = _OPERANDS.get(flatbuffer_utils.opcode_to_name(model, operator.opcodeIndex))
        if places is None or len(operator.inputs) <= max(places) or operator.inputs[places[2]] < 0:
            continue
        data, weights, bias = (graph.tensors[operator.inputs[place]] for place in places)
        if data.type != schema.TensorType.INT8 or bias.type != schema.TensorType.INT32:
            continue
        present = np.asarray(bias.quantization.scale, np.float64)
        wanted = np.float64(data.quantization.scale[0]) * np.asarray(weights.quantization.scale, np.float64)
        if np.allclose(present, wanted, rtol=1e-5, atol=0):
            continue
        codes = np.frombuffer(bytes(model.buffers[bias.buffer].data), np.int32)
        limits = np.iinfo(np.int32)
        codes = np.rint(codes * (present / wanted)).clip(limits.min, limits.max).astype(np.int32)
        model.buffers[bias.buffer].data = np.frombuffer(codes.tobytes(), np.uint8)
        bias.quantization.scale = wanted.astype(np.float32)
