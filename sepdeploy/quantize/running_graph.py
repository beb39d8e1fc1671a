"""The operators that onnxruntime really runs for a file, after its optimizer."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from sepdeploy.core.quiet import first_line
from sepdeploy.errors import UsageError

if TYPE_CHECKING:
    import onnx

__all__ = ["running_graph"]


def running_graph(path: Path) -> onnx.GraphProto:
    """The graph that onnxruntime makes of an ONNX file on this processor, without changes of layout.

    Raises:
        UsageError: if onnxruntime cannot load the file.
    """
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory(prefix="sepdeploy-") as folder:
        optimized = Path(folder) / "optimized.onnx"
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(optimized)
        # The level above only changes layouts, and writes a graph that other programs cannot read.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        try:
            onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions share no base class
            raise UsageError(f"onnxruntime cannot load {path}: {first_line(error)}") from error
        return onnx.load(str(optimized)).graph
