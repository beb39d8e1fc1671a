"""Float32 ONNX to int8 ONNX: explicit quantize and dequantize pairs (QDQ) that every ONNX runtime understands."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sepdeploy.core.artifact import Format
from sepdeploy.core.int8 import Affine, IoType, PlaceRange, RangeMethod
from sepdeploy.core.quiet import quiet
from sepdeploy.errors import SepdeployError, ToolError, UsageError
from sepdeploy.quantize.calibration_images import checked_images
from sepdeploy.quantize.file_ranges import ranges_of_file
from sepdeploy.quantize.inspect_int8 import require_int8_convs
from sepdeploy.quantize.onnx_io import set_io_type
from sepdeploy.quantize.saturation import saturates_u8s8

if TYPE_CHECKING:
    import onnx

__all__ = ["OnnxTensors", "quantize_onnx"]

_SAME_SCALE = frozenset(
    {"AveragePool", "Flatten", "Gather", "Identity", "MaxPool", "Pad", "Reshape", "Resize", "Slice", "Split",
     "Squeeze", "Transpose", "Unsqueeze"}
)  # fmt: skip
_UNJOINED = _SAME_SCALE | {"Clip", "Concat", "Sigmoid", "Softmax", "Tanh"}
"""Operators whose output keeps its scale where it is joined to others; a Clip, because onnxruntime leaves it out."""

_FUSING = frozenset({"Add", "Conv", "ConvTranspose", "Gemm", "MatMul", "Mul", "Sub"})


def quantize_onnx(
    source: Path,
    destination: Path,
    images: Iterable[np.ndarray],
    *,
    places: tuple[PlaceRange, ...] = (),
    method: RangeMethod = "minmax",
    io: IoType = "auto",
) -> None:
    """Write the int8 version of the float32 ONNX file `source` to `destination`.

    Weights are int8, symmetric, one scale per output channel; activations are uint8, asymmetric, one scale per tensor.
    This U8S8 pairing is what onnxruntime fuses on x86 and Arm alike. Where this machine saturates in it
    (`saturates_u8s8`) weights keep to 7 bits, which every machine computes exactly. The same images give the same bytes
    on the same kind of processor; memory does not grow with their number.

    Args:
        source: Float32 ONNX file with one input and static shapes.
        destination: The file to write.
        images: Inputs as the file takes them, (1, C, H, W) float32 for images; read once, and only as far as needed.
        places: Ranges of the network's activations; tensors that hold something else get their own.
        method: How their own range follows from the images.
        io: Type of the input and the outputs; 'auto' is float32.

    Raises:
        UsageError: if there are no images, or they do not fit the file's input.
        ToolError: if onnxruntime's quantizer fails, or leaves every convolution in float.
        OSError: if `destination` cannot be written.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="sepdeploy-") as folder:
            data = _quantized(source, Path(folder), images, places, method, io)
    except (SepdeployError, OSError):
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ToolError(f"onnxruntime could not quantize {source}: {reason}") from error
    destination.write_bytes(data)
    require_int8_convs(destination, Format.ONNX)


def _quantized(
    source: Path,
    folder: Path,
    images: Iterable[np.ndarray],
    places: tuple[PlaceRange, ...],
    method: RangeMethod,
    io: IoType,
) -> bytes:
    import onnx
    from onnxruntime.quantization import QDQQuantizer, QuantType, quant_pre_process

    prepared = folder / "prepared.onnx"
    with quiet():
        # Symbolic inference is for dynamic shapes and needs sympy; ours are static.
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        model = onnx.load(str(prepared))
    name, shape = _single_input(model, source)
    affines = ranges_of_file(OnnxTensors(model, name), checked_images(images, shape), places, method)
    # onnxruntime leaves a Relu out before it is quantized: only a zero point of 0 does the same. The scale is kept.
    rectified = [output for node in model.graph.node if node.op_type == "Relu" for output in node.output]
    affines |= {each: Affine(affines[each].scale, 0) for each in rectified if each in affines}
    with quiet():
        # What `quantize_static` does after calibrating.
        quantizer = QDQQuantizer(
            model,
            per_channel=True,
            reduce_range=saturates_u8s8(),
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QUInt8,
            tensors_range=_tensors_data(affines),
            nodes_to_quantize=[],
            nodes_to_exclude=_beyond_the_quantizer(model.graph),
            op_types_to_quantize=_quantizable_op_types(),
            extra_options={"WeightSymmetric": True, "ActivationSymmetric": False},
        )
        quantizer.quantize_model()
        quantizer.model.save_model_to_file(str(folder / "quantized.onnx"))  # this also sorts the nodes
    quantized = onnx.load(str(folder / "quantized.onnx"))
    quantized.ClearField("metadata_props")
    _drop_unused_opsets(quantized)
    set_io_type(quantized, "float32" if io == "auto" else io)
    data: bytes = quantized.SerializeToString(deterministic=True)
    onnx.checker.check_model(data, full_check=True)
    return data


def _beyond_the_quantizer(graph: onnx.GraphProto) -> list[str]:
    """Nodes at which onnxruntime's quantizer fails: they stay in float.

    It has too few scales for transposed convolutions with groups and a bias (which onnxruntime computes in float
    anyway), and for norms of several axes.
    """
    ranks = {each.name: len(each.dims) for each in graph.initializer}
    return [
        node.name
        for node in graph.node
        if (
            node.op_type == "ConvTranspose"
            and len(node.input) > 2
            and any(attribute.name == "group" and attribute.i > 1 for attribute in node.attribute)
        )
        or (node.op_type == "LayerNormalization" and ranks.get(node.input[1], 1) > 1)
    ]


def _drop_unused_opsets(model: onnx.ModelProto) -> None:
    """Drop the operator sets that onnxruntime's optimizer declares but no node uses: other runtimes reject them."""
    domains = {node.domain for node in model.graph.node}
    used = [opset for opset in model.opset_import if opset.domain in domains]
    del model.opset_import[:]
    model.opset_import.extend(used)


def _single_input(model: onnx.ModelProto, source: Path) -> tuple[str, tuple[int, ...]]:
    constants = {initializer.name for initializer in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    if len(inputs) != 1:
        raise UsageError(f"{source} has {len(inputs)} inputs; only networks with one input can be calibrated")
    return inputs[0].name, tuple(dim.dim_value for dim in inputs[0].type.tensor_type.shape.dim)


def _quantizable_op_types() -> list[str]:
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    return sorted({*QDQRegistry, *QLinearOpsRegistry})


def _tensors_data(affines: Mapping[str, Affine]) -> Any:
    """Ranges in onnxruntime's terms; it computes the same scales and zero points from them again."""
    from onnxruntime.quantization import CalibrationMethod
    from onnxruntime.quantization.calibrate import TensorData, TensorsData

    data = {
        name: TensorData(lowest=np.float32(affine.low), highest=np.float32(affine.high))
        for name, affine in affines.items()
    }
    return TensorsData(CalibrationMethod.MinMax, data)


class OnnxTensors:
    """The activations of a float ONNX graph, in onnxruntime without its optimizations.

    Args:
        model: With all types inferred, as `quant_pre_process` leaves it.
        input_name: Of its only input.

    Attributes:
        aliases: See `FileTensors`.
    """

    def __init__(self, model: onnx.ModelProto, input_name: str) -> None:
        import onnx
        import onnxruntime

        inferred = onnx.shape_inference.infer_shapes(model)
        floats = {
            value.name
            for value in (*inferred.graph.value_info, *inferred.graph.output)
            if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
        }
        self._input = input_name
        constants = {initializer.name for initializer in model.graph.initializer}
        flowing = _flowing_tensors(model.graph, input_name)
        self._names = [name for name in flowing if name in floats and name not in constants]
        self.aliases = _aliases(model.graph, flowing)
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        own = {output.name for output in copy.graph.output}
        copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in self._names if name not in own)
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self._session: Any = onnxruntime.InferenceSession(
            copy.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def run(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """All floating-point activations for one image, by name."""
        values = self._session.run(self._names, {self._input: image})
        return {self._input: image, **dict(zip(self._names, values, strict=True))}


def _flowing_tensors(graph: onnx.GraphProto, input_name: str) -> list[str]:
    """Names of what depends on the input, in order."""
    flowing = {input_name: None}
    for node in graph.node:
        if any(name in flowing for name in node.input):
            flowing |= dict.fromkeys(name for name in node.output if name)
    del flowing[input_name]
    return list(flowing)


def _aliases(graph: onnx.GraphProto, flowing: Iterable[str]) -> dict[str, str]:
    """Tensors that are moved from another one, or that only one operator reads: an activation or a concatenation.

    An activation is computed with the operator before it; parts of a concatenation have its scale, as in TFLite.
    """
    known = {*flowing}
    outputs = {output.name for output in graph.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in dict.fromkeys(node.input):  # x + x reads x once
            readers.setdefault(name, []).append(node)
    aliases: dict[str, str] = {}
    for node in graph.node:
        if node.op_type in _SAME_SCALE and node.input[0] in known:
            aliases |= dict.fromkeys(node.output, node.input[0])
            continue
        after = readers.get(node.output[0], [])
        if len(after) != 1 or node.output[0] in outputs or node.output[0] not in known:
            continue
        is_fused = node.op_type in _FUSING and after[0].op_type in ("Relu", "Clip")
        is_joined = node.op_type not in _UNJOINED and after[0].op_type == "Concat"
        if is_fused or is_joined:
            aliases[node.output[0]] = after[0].output[0]
    return aliases
