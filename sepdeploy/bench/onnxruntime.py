"""ONNX files in onnxruntime, on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sepdeploy.bench.session import Codes, predict_in_batches, random_input
from sepdeploy.core.quiet import first_line
from sepdeploy.errors import ToolError, UsageError

__all__ = ["OrtSession"]

_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(int16)": np.int16,
    "tensor(uint16)": np.uint16,
    "tensor(int32)": np.int32,
    "tensor(uint32)": np.uint32,
    "tensor(int64)": np.int64,
    "tensor(uint64)": np.uint64,
    "tensor(bool)": np.bool_,
}


class OrtSession:
    """An ONNX file in onnxruntime's CPU provider.

    A symbolic batch dimension is taken as 1.

    Args:
        path: The file.
        threads: Threads inside an operator; operators run one after the other.

    Raises:
        UsageError: if the file is no valid ONNX or has other symbolic dimensions.
        ToolError: if onnxruntime is not installed.
    """

    def __init__(self, path: Path, *, threads: int = 1) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise ToolError(f"onnxruntime cannot be imported ({error}); run pip install onnxruntime") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = 3
        if threads > 1:
            # Workers that spin on after a run would take the cores from the next session of an interleaved measurement.
            options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            self._session: Any = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions share no base class
            raise UsageError(f"onnxruntime cannot load {path}: {first_line(error)}") from error
        self.path = path
        self._threads = threads
        self.runtime = f"onnxruntime {onnxruntime.__version__}"
        self._inputs = [
            (value.name, _static_shape(path, value), _dtype(path, value)) for value in _inputs(self._session)
        ]
        self._codes = _end_codes(path, self._session)
        self._binding: Any = None

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of the first input."""
        return self._inputs[0][1]

    def predict(self, batch: np.ndarray) -> tuple[np.ndarray, ...]:
        """Run the network on `batch`; see `Session.predict`."""
        if len(self._inputs) > 1:
            raise UsageError(f"{self.path} has {len(self._inputs)} inputs; it can be timed, but not fed with images")
        name, shape, dtype = self._inputs[0]
        outputs = [value.name for value in self._session.get_outputs()]
        if not np.issubdtype(dtype, np.floating) and name not in self._codes:
            raise UsageError(
                f"{self.path} takes {dtype} and does not say how to quantize its input; export it with a float32 input"
            )

        def run(piece: np.ndarray) -> tuple[np.ndarray, ...]:
            codes = self._codes.get(name)
            values = piece.astype(dtype, copy=False) if codes is None else codes.quantized(piece)
            try:
                found = self._session.run(outputs, {name: values})
            except Exception as error:
                raise self._run_error(error) from error
            pairs = zip(outputs, found, strict=True)
            return tuple(self._codes[o].dequantized(each) if o in self._codes else each for o, each in pairs)

        return predict_in_batches(batch, shape, run)

    def set_random_input(self, seed: int) -> None:
        """Bind random inputs for `run_once`."""
        rng = np.random.default_rng(seed)
        self._binding = self._session.io_binding()
        for name, shape, dtype in self._inputs:
            self._binding.bind_cpu_input(name, random_input(shape, dtype, rng))
        for output in self._session.get_outputs():
            self._binding.bind_output(output.name)
        try:
            self.run_once()  # a file that cannot run says so here, not inside the timed loop
        except Exception as error:
            raise self._run_error(error) from error

    def run_once(self) -> None:
        """Run the network on the inputs that `set_random_input` bound."""
        self._session.run_with_iobinding(self._binding)

    def reopen(self) -> OrtSession:
        """Load the file once more; see `Session.reopen`."""
        return OrtSession(self.path, threads=self._threads)

    def _run_error(self, error: Exception) -> ToolError:
        return ToolError(f"onnxruntime fails to run {self.path}: {first_line(error)}")


def _end_codes(path: Path, session: Any) -> dict[str, Codes]:
    """How the 8-bit inputs and outputs of a file stand for real numbers, by name, as its own operators say."""
    ends = (*session.get_inputs(), *session.get_outputs())
    names = {end.name for end in ends if end.type in ("tensor(int8)", "tensor(uint8)")}
    if not names:
        return {}
    import onnx

    graph = onnx.load(str(path)).graph
    constants = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    found = {}
    for node in graph.node:
        if node.op_type == "DequantizeLinear":
            name = node.input[0]
        elif node.op_type == "QuantizeLinear":
            name = node.output[0]
        else:
            continue
        if name in names and len(node.input) == 3 and all(each in constants for each in node.input[1:]):
            scale, zero_point = (constants[each] for each in node.input[1:])
            if scale.size == 1:
                found[name] = Codes(float(scale), int(zero_point), zero_point.dtype)
    return found


def _inputs(session: Any) -> list[Any]:
    inputs: list[Any] = session.get_inputs()
    if not inputs:
        raise UsageError("the ONNX file has no input")
    return inputs


def _static_shape(path: Path, value: Any) -> tuple[int, ...]:
    """Shape of an input with 1 for a symbolic batch dimension."""
    shape = [1 if i == 0 and not isinstance(size, int) else size for i, size in enumerate(value.shape)]
    if not all(isinstance(size, int) for size in shape):
        raise UsageError(
            f"input '{value.name}' of {path} has the dynamic shape {value.shape}; "
            "export it with a fixed height and width"
        )
    return tuple(shape)


def _dtype(path: Path, value: Any) -> np.dtype[Any]:
    if value.type not in _DTYPES:
        raise UsageError(f"input '{value.name}' of {path} is a {value.type}; only numeric tensors can be fed")
    return np.dtype(_DTYPES[value.type])
