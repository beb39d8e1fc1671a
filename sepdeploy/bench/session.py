"""What every runtime offers: predictions in the layout of PyTorch, and bare runs for timing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sepdeploy.errors import UsageError

__all__ = ["Codes", "Session", "open_session", "predict_in_batches", "random_input"]


@dataclass(frozen=True, slots=True)
class Codes:
    """How a tensor's integers stand for real numbers: value = scale * (code - zero_point).

    Attributes:
        scale: Above 0.
        zero_point: The code of 0.0.
        dtype: Of the codes.
    """

    scale: float
    zero_point: int
    dtype: np.dtype[Any]

    def quantized(self, values: np.ndarray) -> np.ndarray:
        """Float32 `values` as codes."""
        info = np.iinfo(self.dtype)
        steps: np.ndarray = np.rint(values / np.float32(self.scale)) + self.zero_point
        codes: np.ndarray = np.clip(steps, info.min, info.max).astype(self.dtype)
        return codes

    def dequantized(self, codes: np.ndarray) -> np.ndarray:
        """Codes as float32 values."""
        values: np.ndarray = (codes.astype(np.float32) - np.float32(self.zero_point)) * np.float32(self.scale)
        return values


class Session(Protocol):
    """A deployable file, loaded into a runtime."""

    @property
    def path(self) -> Path:
        """The file."""
        ...

    @property
    def runtime(self) -> str:
        """Name and version of the runtime, such as 'onnxruntime 1.31.1'."""
        ...

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of the first input in the layout of the PyTorch network, (1, C, H, W) for images."""
        ...

    def predict(self, batch: np.ndarray) -> tuple[np.ndarray, ...]:
        """Run the network.

        Args:
            batch: (N, C, H, W) float32, or what the PyTorch network takes; N is a multiple of the file's batch size.

        Returns:
            One array per output, (N, ...) float32, in the layout of the PyTorch network.

        Raises:
            UsageError: if `batch` does not fit, or the file has several inputs.
        """
        ...

    def set_random_input(self, seed: int) -> None:
        """Fill every input with random values for `run_once`."""
        ...

    def run_once(self) -> None:
        """Run the network on the input that was set, without conversions; what is timed."""
        ...

    def reopen(self) -> Session:
        """Load the file once more with the same settings, into a session that shares nothing with this one.

        Raises:
            UsageError: if the file is gone or damaged by now.
        """
        ...


def open_session(path: Path, *, threads: int = 1, is_channels_last: bool = False) -> Session:
    """Load the ONNX or TFLite file at `path` into its runtime.

    Args:
        path: A file that ends in .onnx or .tflite.
        threads: Threads of the runtime, at least 1.
        is_channels_last: Whether the file takes and returns NHWC where the PyTorch network has NCHW (TFLite only).

    Raises:
        UsageError: if the file is missing, damaged, of another kind or has dynamic shapes.
        ToolError: if the runtime is not installed.
    """
    if threads < 1:
        raise UsageError(f"--threads must be at least 1, got {threads}")
    suffix = path.suffix.lower()
    if suffix not in {".onnx", ".tflite"}:
        raise UsageError(f"{path} is neither an .onnx nor a .tflite file; convert it first with sepdeploy convert")
    if not path.is_file():
        raise UsageError(f"{path} does not exist or is not a file")
    if suffix == ".onnx":
        from sepdeploy.bench.onnxruntime import OrtSession

        if is_channels_last:
            raise UsageError(f"{path} is an ONNX file, and those keep the layout of the PyTorch network")
        return OrtSession(path, threads=threads)
    from sepdeploy.bench.litert import LitertSession

    return LitertSession(path, threads=threads, is_channels_last=is_channels_last)


def predict_in_batches(
    batch: np.ndarray, input_shape: tuple[int, ...], run: Callable[[np.ndarray], tuple[np.ndarray, ...]]
) -> tuple[np.ndarray, ...]:
    """Cut `batch` into pieces of the file's batch size, `run` each, and join the outputs.

    Args:
        batch: (N, ...).
        input_shape: What `run` takes, (B, ...).
        run: From one piece to its outputs, each (B, ...).

    Returns:
        One array per output, (N, ...) float32.

    Raises:
        UsageError: if `batch` is empty, has another shape, or N is not a multiple of B.
    """
    size = input_shape[0] if input_shape else 1
    if batch.shape[1:] != input_shape[1:] or len(batch) == 0 or len(batch) % size:
        raise UsageError(f"the file takes inputs of shape {input_shape}, got a batch of shape {batch.shape}")
    pieces = [run(np.ascontiguousarray(batch[i : i + size], dtype=np.float32)) for i in range(0, len(batch), size)]
    return tuple(np.concatenate(outputs).astype(np.float32, copy=False) for outputs in zip(*pieces, strict=True))


def random_input(shape: tuple[int, ...], dtype: np.dtype[Any], rng: np.random.Generator) -> np.ndarray:
    """Random values that any network can digest: normal floats, 8-bit integers, and 0 or 1 for wider ones (indices)."""
    if np.issubdtype(dtype, np.floating):
        return rng.standard_normal(shape).astype(dtype)
    if dtype in (np.dtype(np.int8), np.dtype(np.uint8)):
        info = np.iinfo(dtype)
        return rng.integers(info.min, info.max, size=shape, dtype=dtype, endpoint=True)
    return rng.integers(0, 2, size=shape).astype(dtype)
