"""Cuts a file with many outputs into one file for each output: many small networks for one export."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["cut_onnx", "cut_tflite"]


def cut_onnx(source: Path, count: int) -> list[Path]:
    """Write a file for each output of an ONNX file, with the operators that it depends on.

    Args:
        source: A file as `export_onnx` writes it, quantized or not, with the outputs 'output_0', 'output_1', ...
        count: How many outputs it has, at least 2.

    Returns:
        The files, beside `source`, in the order of the outputs.
    """
    import onnx
    from onnx.utils import Extractor

    extractor = Extractor(onnx.load(source))
    paths = _paths(source, count)
    for i, path in enumerate(paths):
        onnx.save(extractor.extract_model(["input"], [f"output_{i}"]), path)
    return paths


def cut_tflite(source: Path, count: int) -> list[Path]:
    """The same for a TFLite file with one signature, as `export_tflite` writes it."""
    from ai_edge_litert.tools import flatbuffer_utils

    paths = _paths(source, count)
    for i, path in enumerate(paths):
        model = flatbuffer_utils.read_model(str(source))  # anew: cutting changes it
        _keep_output(model, f"output_{i}")
        flatbuffer_utils.write_model(model, str(path))
    return paths


def _paths(source: Path, count: int) -> list[Path]:
    return [source.with_name(f"{i}.{source.name}") for i in range(count)]


def _keep_output(model: Any, name: str) -> None:
    """Leave of a TFLite model only what one output depends on; in place."""
    (graph,) = model.subgraphs
    (signature,) = model.signatureDefs
    signature.outputs = [output for output in signature.outputs if output.name.decode() == name]
    graph.outputs = [output.tensorIndex for output in signature.outputs]
    needed = set(graph.outputs)
    operators = []
    for operator in reversed(graph.operators):
        if needed.intersection(operator.outputs):
            needed.update(operator.inputs, operator.outputs)
            operators.append(operator)
    graph.operators = operators[::-1]
    tensors = _numbered({*needed, *graph.inputs} - {-1})  # -1: an input left out
    graph.tensors = [graph.tensors[old] for old in tensors]
    graph.inputs, graph.outputs = ([tensors[old] for old in ends] for ends in (graph.inputs, graph.outputs))
    for operator in operators:
        operator.inputs = [tensors.get(old, -1) for old in operator.inputs]
        operator.outputs = [tensors[old] for old in operator.outputs]
    for end in (*signature.inputs, *signature.outputs):
        end.tensorIndex = tensors[end.tensorIndex]
    model.metadata = []
    buffers = _numbered({0, *(tensor.buffer for tensor in graph.tensors)})  # 0: the empty one of all activations
    model.buffers = [model.buffers[old] for old in buffers]
    for tensor in graph.tensors:
        tensor.buffer = buffers[tensor.buffer]


def _numbered(old: Iterable[int]) -> dict[int, int]:
    """Old number -> new one, without gaps, in the same order."""
    return {number: place for place, number in enumerate(sorted(old))}
