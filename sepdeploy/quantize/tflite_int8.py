"""Float32 TFLite to int8 TFLite: integer input, output and arithmetic throughout, as NPUs need it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from sepdeploy.core.artifact import Format
from sepdeploy.core.int8 import IoType, PlaceRange, RangeMethod
from sepdeploy.core.quiet import quiet, silenced_native_stderr
from sepdeploy.errors import SepdeployError, ToolError, UsageError
from sepdeploy.quantize.calibration_images import checked_images
from sepdeploy.quantize.drop_activations import drop_redundant_activations
from sepdeploy.quantize.file_ranges import ranges_of_file
from sepdeploy.quantize.inspect_int8 import require_int8_convs
from sepdeploy.quantize.join_int8 import join_int8
from sepdeploy.quantize.tflite_io import with_io_type

__all__ = ["TfliteTensors", "quantize_tflite"]

_SAME_SCALE = frozenset(
    {"AVERAGE_POOL_2D", "BROADCAST_TO", "GATHER", "GATHER_ND", "MAX_POOL_2D", "MIRROR_PAD", "PAD", "RESHAPE",
     "RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR", "SLICE", "SPACE_TO_DEPTH", "SPLIT", "STRIDED_SLICE", "TRANSPOSE",
     "UNPACK"}
)  # fmt: skip
_UNJOINED = _SAME_SCALE | {"CONCATENATION", "LOGISTIC", "PACK", "SOFTMAX", "TANH"}
"""Operators whose output keeps its scale where it is joined to others."""


def quantize_tflite(
    source: Path,
    destination: Path,
    images: Iterable[np.ndarray],
    *,
    places: tuple[PlaceRange, ...] = (),
    method: RangeMethod = "minmax",
    io: IoType = "auto",
) -> None:
    """Write the int8 version of the float32 TFLite file `source` to `destination`.

    Weights are int8, symmetric, one scale per output channel; activations are int8, asymmetric, one scale per tensor.
    Activations that saturation implies are dropped. The same images give the same bytes; memory does not grow with
    their number.

    Args:
        source: Float32 TFLite file with one input and static shapes.
        destination: The file to write.
        images: Inputs as the file takes them, (1, H, W, C) float32 for a channels-last file; read once, and only as far
            as needed.
        places: Ranges of the network's activations; tensors that hold something else get their own.
        method: How their own range follows from the images.
        io: Type of the input and the outputs; 'auto' is int8.

    Raises:
        UsageError: if there are no images, or they do not fit the file's input.
        ToolError: if ai-edge-quantizer is not installed, fails, or leaves every convolution in float.
        OSError: if `destination` cannot be written.
    """
    try:
        with quiet():
            import ai_edge_quantizer.quantizer  # noqa: F401
    except ImportError as error:
        raise ToolError(
            f"ai-edge-quantizer cannot be imported ({error}); "
            "run pip install 'sepdeploy[tflite]', or leave TFLite out with --formats onnx"
        ) from error
    try:
        data = _quantized(source, images, places, method, io)
    except (SepdeployError, OSError):
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ToolError(f"ai-edge-quantizer could not quantize {source}: {reason}") from error
    destination.write_bytes(data)
    require_int8_convs(destination, Format.TFLITE)


def _quantized(
    source: Path, images: Iterable[np.ndarray], places: tuple[PlaceRange, ...], method: RangeMethod, io: IoType
) -> bytes:
    from ai_edge_quantizer import quantizer, recipe

    shape = _single_input(source)[2]
    # Its own calibration takes a moving average that clips the ranges and costs 10 to 25 dB.
    affines = ranges_of_file(TfliteTensors(source), checked_images(images, shape), places, method)
    ranges = {
        # The rounding to float32 is that of the ONNX file, so that both come to the same scales.
        name: {"min": _as_float32(affine.low), "max": _as_float32(affine.high)}
        for name, affine in affines.items()
    }
    with quiet():
        static_int8 = recipe.static_wi8_ai8()
        result = quantizer.Quantizer(str(source), static_int8).quantize(ranges, enable_progress_report=False)
    data = drop_redundant_activations(join_int8(bytes(result.quantized_model))[0])[0]
    return with_io_type(data, "int8" if io == "auto" else io)


def _as_float32(value: float) -> np.ndarray:
    return np.array(value, np.float32).astype(np.float64)


class TfliteTensors:
    """The activations of a float TFLite file, in LiteRT with every tensor kept.

    Args:
        source: The file.

    Attributes:
        aliases: See `FileTensors`.
    """

    def __init__(self, source: Path) -> None:
        from ai_edge_litert.interpreter import Interpreter

        with quiet(), silenced_native_stderr():
            self._interpreter: Any = Interpreter(str(source), num_threads=1, experimental_preserve_all_tensors=True)
            self._interpreter.allocate_tensors()
        self._input = self._interpreter.get_input_details()[0]["index"]
        details = self._interpreter.get_tensor_details()
        makers, self.aliases = _flow(source, [str(detail["name"]) for detail in details])
        self._names = {
            int(detail["index"]): str(detail["name"])
            for detail in details
            if detail["dtype"] is np.float32 and detail["index"] in makers | {self._input}
        }

    def run(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """All floating-point activations for one image, by name."""
        self._interpreter.set_tensor(self._input, image)
        self._interpreter.invoke()
        return {name: self._interpreter.get_tensor(index) for index, name in self._names.items()}


def _flow(source: Path, names: list[str]) -> tuple[set[int], dict[str, str]]:
    """Tensors that an operator makes, by index, and those that have the codes of another, by name."""
    from ai_edge_litert import schema_py_generated as schema

    codes = {code: name for name, code in vars(schema.BuiltinOperator).items() if not name.startswith("_")}
    model = schema.Model.GetRootAs(source.read_bytes(), 0)
    graph = model.Subgraphs(0)
    makers: set[int] = set()
    aliases: dict[str, str] = {}
    readers: dict[int, list[tuple[str, int]]] = {}  # tensor -> the operators that read it, with what they make
    for k in range(graph.OutputsLength()):
        readers.setdefault(graph.Outputs(k), []).append(("", -1))
    operators = []
    for op in (graph.Operators(i) for i in range(graph.OperatorsLength())):
        code = model.OperatorCodes(op.OpcodeIndex())
        name = codes[max(code.BuiltinCode(), code.DeprecatedBuiltinCode())]
        inputs = [op.Inputs(k) for k in range(op.InputsLength())]
        outputs = [op.Outputs(k) for k in range(op.OutputsLength())]
        operators.append((name, inputs, outputs))
        makers |= {*outputs}
        for tensor in dict.fromkeys(inputs):  # x + x reads x once
            readers.setdefault(tensor, []).append((name, outputs[0]))
    for name, inputs, outputs in operators:
        if name in _SAME_SCALE:
            data = 1 if name == "SPLIT" else 0
            aliases |= {names[output]: names[inputs[data]] for output in outputs}
            continue
        for output in outputs:
            after = readers.get(output, [])
            if len(after) == 1 and after[0][0] == "CONCATENATION" and name not in _UNJOINED:
                aliases[names[output]] = names[after[0][1]]
    return makers, aliases


def _single_input(source: Path) -> tuple[str, str, tuple[int, ...]]:
    """Signature, name and shape of the only input of the file."""
    from ai_edge_litert.interpreter import Interpreter

    with silenced_native_stderr():
        interpreter = Interpreter(str(source))
        interpreter.allocate_tensors()
        signatures = interpreter.get_signature_list()
        details = interpreter.get_input_details()
    if len(signatures) != 1 or len(details) != 1:
        raise UsageError(
            f"{source} has {len(signatures)} signatures and {len(details)} inputs; only networks with one of each "
            "can be calibrated"
        )
    ((signature, ends),) = signatures.items()
    return signature, ends["inputs"][0], tuple(int(size) for size in details[0]["shape"])
