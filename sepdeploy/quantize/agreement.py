"""Whether int8 files and their simulation in PyTorch give the same outputs, up to one step of the outputs' scale."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.fx import GraphModule

from sepdeploy.core.int8 import Affine, PlaceRange
from sepdeploy.core.quiet import quiet, silenced_native_stderr
from sepdeploy.quantize.file_ranges import FileTensors, fingerprint, match_places
from sepdeploy.quantize.simulate import fake_quantized

__all__ = ["affines_of_onnx", "affines_of_tflite", "agreement_ratio", "simulation_of_file"]


def affines_of_onnx(path: Path) -> dict[str, Affine]:
    """Scale and zero point of each quantized activation of a QDQ file, by the name that it has in the float file."""
    import onnx

    graph = onnx.load(str(path)).graph
    constants = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    found = {}
    for node in graph.node:
        if node.op_type == "QuantizeLinear" and all(name in constants for name in node.input[1:]):
            scale, zero_point = (constants[name] for name in node.input[1:3])
            # onnxruntime's quantizer renames what it quantizes at an output of the file.
            name = node.input[0].removesuffix("_QuantizeLinear_Input")
            found[name] = _affine(float(scale), int(zero_point), zero_point.dtype)
    return found


def affines_of_tflite(path: Path) -> dict[str, Affine]:
    """Scale and zero point of each 8-bit activation of a file, by name."""
    from ai_edge_litert.interpreter import Interpreter

    with quiet(), silenced_native_stderr():
        interpreter: Any = Interpreter(str(path))
        details = interpreter.get_tensor_details()
    found = {}
    for detail in details:
        parameters = detail["quantization_parameters"]
        if detail["dtype"] in (np.int8, np.uint8) and len(parameters["scales"]) == 1:
            zero_point = int(parameters["zero_points"][0])
            found[str(detail["name"])] = _affine(float(parameters["scales"][0]), zero_point, np.dtype(detail["dtype"]))
    return found


def _affine(scale: float, zero_point: int, dtype: np.dtype[Any]) -> Affine:
    return Affine(scale, zero_point + (128 if dtype == np.int8 else 0))


def simulation_of_file(
    graph: GraphModule,
    places: Sequence[PlaceRange],
    tensors: FileTensors,
    affines: dict[str, Affine],
    images: Iterable[np.ndarray],
) -> GraphModule:
    """The float graph with the scales and zero points that a file has.

    Args:
        graph: Of the network that the file was made from (`capture_graph`).
        places: Its activations with their fingerprints; their own scales are not used.
        tensors: The float file that was quantized.
        affines: What the int8 file says of its tensors.
        images: Those of the fingerprints, as the file takes them.
    """
    prints: dict[str, list[tuple[float, ...]]] = {}
    for image in images:
        for name, values in tensors.run(image).items():
            prints.setdefault(name, []).append(fingerprint(values))
    found = match_places(places, {name: tuple(prints[name]) for name in prints if name in affines})
    return fake_quantized(graph, {place.name: affines[name] for name, place in found.items()})


def agreement_ratio(first: Sequence[np.ndarray], second: Sequence[np.ndarray], steps: Sequence[float]) -> float:
    """Share of output values that differ by one step of the output's scale at most, in [0, 1].

    Args:
        first: Outputs.
        second: Others, of the same shapes.
        steps: Scale of each output.
    """
    close = total = 0
    for a, b, step in zip(first, second, steps, strict=True):
        close += int((np.abs(a.astype(np.float64) - b) <= 1.001 * step).sum())
        total += a.size
    return close / max(total, 1)
