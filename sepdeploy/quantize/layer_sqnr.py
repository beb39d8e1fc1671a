"""Where an int8 file loses precision: each layer against the same layer of the float32 file, image by image."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sepdeploy.core.int8_proof import LayerSqnr
from sepdeploy.core.quiet import silenced_native_stderr
from sepdeploy.quantize.int8_share import ONNX_LAYERS, tflite_layers, weights_of_onnx
from sepdeploy.quantize.layer_names import onnx_layer_name
from sepdeploy.quantize.mixed_onnx import is_copy

if TYPE_CHECKING:
    import onnx

__all__ = ["layer_sqnr_of_onnx", "layer_sqnr_of_tflite"]


def layer_sqnr_of_onnx(source: Path, int8: Path, images: Iterable[np.ndarray]) -> tuple[LayerSqnr, ...]:
    """Signal-to-noise ratio at each convolution and matrix product of an int8 ONNX file.

    Both files run in onnxruntime on each image; of one image at a time the activations are held.

    Args:
        source: The float32 file that `int8` was quantized from; tensors have the same names in both.
        int8: The int8 file, in QDQ form.
        images: Inputs as the float32 file takes them.

    Returns:
        One entry per layer in the order of the file; none for a layer whose tensors the float32 file does not have.
    """
    import onnx

    float_model, int8_model = onnx.load(str(source)), onnx.load(str(int8))
    _dequantize_outputs(int8_model.graph)
    layers = _onnx_taps(float_model.graph, int8_model.graph)
    names = sorted({name for layer in layers for name in (*layer.inputs, layer.output)})
    behind = _int8_names(int8_model.graph)
    float_file = _OnnxFile(float_model, names)
    int8_file = _OnnxFile(int8_model, [behind.get(name, name) for name in names])
    ratios = {name: _Ratio() for name in names}
    for image in images:
        for name, expected, found in zip(names, float_file.run(image), int8_file.run(image), strict=True):
            ratios[name].add(expected, found)
    return tuple(layer.result(ratios) for layer in layers)


def layer_sqnr_of_tflite(source: Path, int8: Path, images: Iterable[np.ndarray]) -> tuple[LayerSqnr, ...]:
    """The same for an int8 TFLite file, which has the operators of the float32 file in the same order.

    The runtime's own kernels run, without XNNPACK, which does not give out what is between operators.
    """
    float_file, int8_file = _TfliteFile(source), _TfliteFile(int8)
    pairs = [
        (before, after)
        for before, after in zip(float_file.layers, int8_file.layers, strict=False)
        if before.op_type == after.op_type and len(before.inputs) == len(after.inputs)
    ]
    taps = [[(before.output, after.output), *zip(before.inputs, after.inputs, strict=True)] for before, after in pairs]
    ratios = {tap: _Ratio() for tap in dict.fromkeys(tap for layer in taps for tap in layer)}
    for image in images:
        float_file.run(image)
        int8_file.run(image)
        for (before, after), ratio in ratios.items():
            ratio.add(float_file.values(before), int8_file.values(after))
    return tuple(
        LayerSqnr(
            layer.name,
            layer.op_type,
            _least(ratios[tap].db for tap in inputs),
            ratios[output].db,
        )
        for (layer, _), (output, *inputs) in zip(pairs, taps, strict=True)
    )


@dataclass(slots=True)
class _Ratio:
    """Sums of squares over all images so far."""

    signal: float = 0.0
    noise: float = 0.0

    def add(self, expected: np.ndarray, found: np.ndarray) -> None:
        """Add the values of one image."""
        before = expected.astype(np.float64).ravel()
        error = before - found.astype(np.float64).ravel()
        self.signal += float(before @ before)
        self.noise += float(error @ error)

    @property
    def db(self) -> float | None:
        """The ratio; None if nothing was lost."""
        if self.noise == 0:
            return None
        return 10 * math.log10(max(self.signal, float(np.finfo(np.float64).tiny)) / self.noise)


def _least(ratios: Iterable[float | None]) -> float | None:
    return min((ratio for ratio in ratios if ratio is not None), default=None)


@dataclass(frozen=True, slots=True)
class _Taps:
    """Where a layer is looked at: tensors of the float32 file."""

    name: str
    operator: str
    inputs: tuple[str, ...]
    output: str

    def result(self, ratios: dict[str, _Ratio]) -> LayerSqnr:
        inputs = _least(ratios[name].db for name in self.inputs)
        return LayerSqnr(self.name, self.operator, inputs, ratios[self.output].db)


def _onnx_taps(float_graph: onnx.GraphProto, int8_graph: onnx.GraphProto) -> list[_Taps]:
    constants = {constant.name for constant in float_graph.initializer}
    known = {value.name for value in float_graph.input} | {name for node in float_graph.node for name in node.output}
    known -= constants
    float_names = {int8_name: name for name, int8_name in _int8_names(int8_graph).items()}
    copies = {node.output[0]: node.input[0] for node in int8_graph.node if is_copy(node)}
    weights = weights_of_onnx(int8_graph)
    readers = _single_readers(int8_graph)
    layers = []
    for node in int8_graph.node:
        if node.op_type not in ONNX_LAYERS:
            continue
        output = node.output[0]
        while output in readers and readers[output].op_type in ("Relu", "Clip"):
            output = readers[output].output[0]
        output = output.removesuffix("_QuantizeLinear_Input")
        inputs = tuple(copies.get(name, name) for name in node.input[:2])
        inputs = tuple(float_names.get(name, name) for name in inputs)
        inputs = tuple(name for name in inputs if name in known)
        if inputs and output in known:
            name = onnx_layer_name(node.name, weights[node.output[0]])
            layers.append(_Taps(name, node.op_type, inputs, output))
    return layers


def _single_readers(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    return {name: nodes[0] for name, nodes in readers.items() if len(nodes) == 1}


def _int8_names(graph: onnx.GraphProto) -> dict[str, str]:
    """Tensor of the float32 file -> the tensor of the QDQ graph that holds its values as they come out of 8 bits."""
    dequantized = {node.input[0]: node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    names = {
        node.input[0].removesuffix("_QuantizeLinear_Input"): dequantized[node.output[0]]
        for node in graph.node
        if node.op_type == "QuantizeLinear" and node.output[0] in dequantized
    }
    return names | {value.name: dequantized[value.name] for value in graph.input if value.name in dequantized}


def _dequantize_outputs(graph: onnx.GraphProto) -> None:
    """Let every quantized tensor be dequantized, those too that a file returns as integers."""
    from onnx import helper

    read = {name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.input}
    for node in [node for node in graph.node if node.op_type == "QuantizeLinear"]:
        if node.output[0] not in read:
            tap = [f"{node.output[0]}_dequantized"]
            graph.node.append(helper.make_node("DequantizeLinear", [node.output[0], *node.input[1:]], tap))


class _OnnxFile:
    """An ONNX model that gives out tensors from its middle."""

    def __init__(self, model: onnx.ModelProto, names: Sequence[str]) -> None:
        import onnxruntime
        from onnx import helper, numpy_helper

        graph = model.graph
        constants = {constant.name: constant for constant in graph.initializer}
        (self._input,) = (value.name for value in graph.input if value.name not in constants)
        self._names = list(names)
        self._scale: tuple[np.ndarray, np.ndarray] | None = None
        for node in graph.node:
            if node.op_type == "DequantizeLinear" and node.input[0] == self._input:
                scale, zero_point = (numpy_helper.to_array(constants[name]) for name in node.input[1:3])
                self._scale = scale, zero_point
        del graph.output[:]
        inner = dict.fromkeys(name for name in names if name != self._input)
        graph.output.extend(helper.make_empty_tensor_value_info(name) for name in inner)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def run(self, image: np.ndarray) -> list[np.ndarray]:
        """The tensors for one float32 image, in order."""
        inner = [value.name for value in self._session.get_outputs()]
        feed = image if self._scale is None else _quantized(image, *self._scale)
        values = dict(zip(inner, self._session.run(inner, {self._input: feed}), strict=True))
        return [image if name == self._input else values[name] for name in self._names]


class _TfliteFile:
    """A TFLite file with all tensors to be seen after a run."""

    def __init__(self, path: Path) -> None:
        from ai_edge_litert.interpreter import Interpreter, OpResolverType

        self.layers = tflite_layers(path)
        with silenced_native_stderr():
            self._interpreter = Interpreter(
                str(path),
                num_threads=1,
                experimental_preserve_all_tensors=True,
                experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
            )
            self._interpreter.allocate_tensors()
        (self._input,) = self._interpreter.get_input_details()
        self._details = {detail["index"]: detail for detail in self._interpreter.get_tensor_details()}

    def run(self, image: np.ndarray) -> None:
        """Run on one float32 image."""
        scale = _scale_of(self._input)
        self._interpreter.set_tensor(self._input["index"], image if scale is None else _quantized(image, *scale))
        self._interpreter.invoke()

    def values(self, tensor: int) -> np.ndarray:
        """What a tensor holds, as real numbers."""
        values: np.ndarray = self._interpreter.get_tensor(tensor)
        scale = _scale_of(self._details[tensor])
        return values if scale is None else (values.astype(np.float32) - scale[1]) * scale[0]


def _scale_of(detail: dict[str, Any]) -> tuple[np.ndarray, np.ndarray] | None:
    """Scale and zero point of a tensor of integers; None of floats."""
    if np.issubdtype(detail["dtype"], np.floating) or not len(detail["quantization_parameters"]["scales"]):
        return None
    parameters = detail["quantization_parameters"]
    return parameters["scales"][0], parameters["zero_points"][0].astype(detail["dtype"])


def _quantized(image: np.ndarray, scale: np.ndarray, zero_point: np.ndarray) -> np.ndarray:
    """Real numbers as the integers of `zero_point`'s type."""
    limits = np.iinfo(zero_point.dtype)
    steps: np.ndarray = np.clip(np.rint(image / scale) + zero_point, limits.min, limits.max).astype(zero_point.dtype)
    return steps
