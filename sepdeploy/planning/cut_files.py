"""Cuts a file with many outputs into one file for each output: many small networks for one export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sepdeploy.bench.prefixes import keep_operators

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
    (signature,) = model.signatureDefs
    signature.outputs = [output for output in signature.outputs if output.name.decode() == name]
    keep_operators(model, [output.tensorIndex for output in signature.outputs])
