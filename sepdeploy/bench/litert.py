"""TFLite files in LiteRT's interpreter, on the CPU with its default XNNPACK delegate."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from sepdeploy.bench.session import Codes, predict_in_batches, random_input
from sepdeploy.core.quiet import first_line, silenced_native_stderr
from sepdeploy.errors import ToolError, UsageError

__all__ = ["LitertSession"]


class LitertSession:
    """A TFLite file in the interpreter of ai-edge-litert, or of tflite-runtime where only that is installed.

    A dynamic batch dimension is taken as 1. Integer inputs and outputs are quantized and dequantized with the scale and
    the zero point in the file.

    Args:
        path: The file.
        threads: Threads of the interpreter.
        is_channels_last: Whether 4-D inputs and outputs of the file are NHWC where the PyTorch network has NCHW.

    Raises:
        UsageError: if the file is no valid TFLite or has other dynamic dimensions.
        ToolError: if no interpreter is installed.
    """

    def __init__(self, path: Path, *, threads: int = 1, is_channels_last: bool = False) -> None:
        interpreter_class, self.runtime = find_interpreter_class()
        try:
            with silenced_native_stderr():
                self._interpreter: Any = interpreter_class(model_path=str(path), num_threads=threads)
                self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise UsageError(f"LiteRT cannot load {path}: {_load_error(error)}") from error
        self.path = path
        self._threads = threads
        self._is_channels_last = is_channels_last
        self._inputs: list[dict[str, Any]] = self._interpreter.get_input_details()
        self._outputs = _ordered_outputs(self._interpreter)
        if not self._inputs:
            raise UsageError(f"{path} has no input")
        for detail in self._inputs:
            _require_static_shape(path, detail)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of the first input, in the layout of the PyTorch network."""
        shape = tuple(int(size) for size in self._inputs[0]["shape"])
        if self._is_channels_last and len(shape) == 4:
            return shape[0], shape[3], shape[1], shape[2]
        return shape

    def predict(self, batch: np.ndarray) -> tuple[np.ndarray, ...]:
        """Run the network on `batch`; see `Session.predict`."""
        if len(self._inputs) > 1:
            raise UsageError(f"{self.path} has {len(self._inputs)} inputs; it can be timed, but not fed with images")
        return predict_in_batches(batch, self.input_shape, self._run)

    def set_random_input(self, seed: int) -> None:
        """Fill the input tensors for `run_once`."""
        rng = np.random.default_rng(seed)
        for detail in self._inputs:
            shape = tuple(int(size) for size in detail["shape"])
            self._interpreter.set_tensor(detail["index"], random_input(shape, np.dtype(detail["dtype"]), rng))
        self._invoke()  # a file that cannot run says so here, not inside the timed loop

    def run_once(self) -> None:
        """Run the network on what is in the input tensors."""
        self._interpreter.invoke()

    def reopen(self) -> LitertSession:
        """Load the file once more; see `Session.reopen`."""
        return LitertSession(self.path, threads=self._threads, is_channels_last=self._is_channels_last)

    def _invoke(self) -> None:
        try:
            self._interpreter.invoke()
        except (ValueError, RuntimeError) as error:
            raise ToolError(f"LiteRT fails to run {self.path}: {first_line(error)}") from error

    def _run(self, piece: np.ndarray) -> tuple[np.ndarray, ...]:
        if self._is_channels_last and piece.ndim == 4:
            piece = np.ascontiguousarray(piece.transpose(0, 2, 3, 1))
        self._interpreter.set_tensor(self._inputs[0]["index"], _quantized(piece, self._inputs[0]))
        self._invoke()
        outputs = [_dequantized(self._interpreter.get_tensor(detail["index"]), detail) for detail in self._outputs]
        if self._is_channels_last:
            outputs = [output.transpose(0, 3, 1, 2) if output.ndim == 4 else output for output in outputs]
        return tuple(outputs)


def find_interpreter_class() -> tuple[Any, str]:
    """The interpreter's class, with the name and version of its package."""
    try:
        from ai_edge_litert.interpreter import Interpreter

        return Interpreter, _name_and_version("ai-edge-litert")
    except ModuleNotFoundError:
        try:
            from tflite_runtime.interpreter import Interpreter

            return Interpreter, _name_and_version("tflite-runtime")
        except ModuleNotFoundError as error:
            raise ToolError(
                "TFLite files need LiteRT to run and it is not installed: pip install ai-edge-litert"
            ) from error


def _name_and_version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:  # built from source or a nightly: importable under another package name
        return f"{package} of unknown version"


def _load_error(error: Exception) -> str:
    lacking = re.search(r"Didn't find op for builtin opcode '(\w+)'", str(error))
    if lacking is None:
        return first_line(error)
    return (
        f"it has no kernel for {lacking[1]}; leave what needs it (torch.sort and topk need STABLEHLO_SORT) out of the "
        "network and do it behind the runtime, or make ONNX files only (--formats onnx)"
    )


def _ordered_outputs(interpreter: Any) -> list[dict[str, Any]]:
    """Details of the outputs in the order of the exported network.

    The converter may reorder the outputs of the graph; their names in the signature, 'output_0', 'output_1', ..., keep
    the order. Files from elsewhere may have no such names; they keep the order of the graph.
    """
    details: list[dict[str, Any]] = interpreter.get_output_details()
    signatures = interpreter.get_signature_list()
    if len(signatures) != 1:
        return details
    named: dict[str, dict[str, Any]] = interpreter.get_signature_runner(next(iter(signatures))).get_output_details()
    if len(named) != len(details) or not all(re.fullmatch(r"output_\d+", name) for name in named):
        return details
    return [named[name] for name in sorted(named, key=lambda name: int(name.removeprefix("output_")))]


def _require_static_shape(path: Path, detail: dict[str, Any]) -> None:
    shape = [int(size) for size in detail["shape_signature"]]
    if any(size < 0 for size in shape[1:]):
        raise UsageError(
            f"input '{detail['name']}' of {path} has the dynamic shape {shape}; export it with a fixed height and width"
        )


def _codes(detail: dict[str, Any]) -> Codes:
    scales = detail["quantization_parameters"]["scales"]
    if len(scales) != 1:
        raise UsageError(f"tensor '{detail['name']}' holds integers without a scale and a zero point to read them with")
    zero_point = int(detail["quantization_parameters"]["zero_points"][0])
    return Codes(float(scales[0]), zero_point, np.dtype(detail["dtype"]))


def _quantized(values: np.ndarray, detail: dict[str, Any]) -> np.ndarray:
    """Float32 `values` in the type of the tensor."""
    dtype = np.dtype(detail["dtype"])
    if np.issubdtype(dtype, np.floating):
        return values.astype(dtype, copy=False)
    return _codes(detail).quantized(values)


def _dequantized(values: np.ndarray, detail: dict[str, Any]) -> np.ndarray:
    """Values of the tensor as float32; integers without a scale, such as class indices, as they are."""
    if len(detail["quantization_parameters"]["scales"]) == 0:
        return values.astype(np.float32, copy=False)
    return _codes(detail).dequantized(values)
