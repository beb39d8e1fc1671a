"""The tensor arena that LiteRT allocates for a TFLite file, read off the addresses of its tensors.

LiteRT places every activation of a network in one block of memory, the arena, in which tensors that are not alive at
the same time share bytes. The Python API does not tell its size, but the address of each tensor; the span of these is
what LiteRT asks the system's allocator for, less one alignment of 64 bytes. It depends on the kernels:

- *Reference kernels* need next to no scratch memory: the arena holds the input, the outputs and every intermediate
  tensor. This is what the network needs by itself, as on a microcontroller, and what liveness predicts.
- *Optimized kernels* also have scratch buffers there, above all im2col: a copy of the input window of every output
  pixel, for each convolution that is not 1x1 and not depthwise.
- *XNNPACK*, the default delegate, takes most operators over, with their tensors, into a workspace of its own that
  cannot be read from outside; the arena keeps what goes in and out. It is not measured here.

Not included: weights and other constants, the interpreter's own structures, and tensors whose shape is known only while
running.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sepdeploy.bench.litert import find_interpreter_class
from sepdeploy.core.quiet import first_line, silenced_native_stderr
from sepdeploy.errors import UsageError

__all__ = ["Arena", "measure_arena"]

_ALIGNMENT_BYTES = 64
"""Tensors in an arena start at multiples of this, so a gap below it between two of them belongs to the arena."""

_KERNELS = ("REF", "WITHOUT_DEFAULT_DELEGATES")
"""Ends of the names of LiteRT's operator resolvers: reference and optimized kernels."""


@dataclass(frozen=True, slots=True)
class Arena:
    """What LiteRT allocates for the activations of one file, without a delegate.

    Attributes:
        tensor_bytes: With reference kernels: the input, the outputs and the intermediate tensors.
        bytes_with_scratch: With optimized kernels: the same, planned together with im2col and other scratch buffers.
    """

    tensor_bytes: int
    bytes_with_scratch: int


def measure_arena(path: Path) -> Arena:
    """Have LiteRT plan and allocate the memory of the TFLite file at `path`, without running it.

    Args:
        path: The file, with static shapes.

    Raises:
        UsageError: if the file is no valid TFLite, or these kernels refuse it.
        ToolError: if no interpreter is installed.
        OSError: if the file cannot be read.
    """
    model = path.read_bytes()
    try:
        reference, optimized = (_allocated_bytes(model, f"BUILTIN_{kernels}") for kernels in _KERNELS)
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"LiteRT cannot allocate {path} without a delegate: {first_line(error)}") from error
    return Arena(reference, optimized)


def _allocated_bytes(model: bytes, resolver: str) -> int:
    """Bytes of the arena, and of what is allocated beside it, with the kernels of that `OpResolverType`."""
    interpreter_class, _ = find_interpreter_class()
    resolver_type = getattr(sys.modules[interpreter_class.__module__].OpResolverType, resolver)
    with silenced_native_stderr():
        interpreter = interpreter_class(model_content=model, experimental_op_resolver_type=resolver_type)
        interpreter.allocate_tensors()
    return _covered_bytes(_activation_blocks(interpreter, model))


def _activation_blocks(interpreter: Any, model: bytes) -> Iterator[tuple[int, int]]:
    """First address and the one behind the last of every allocated tensor that is not a constant in the file."""
    # Scratch tensors have no name, so the public methods do not list them.
    native = interpreter._interpreter
    model_start = _address(np.frombuffer(model, np.uint8))
    for index in range(native.NumTensors(0)):
        try:
            shape = native.TensorSize(index, 0)  # raises for scratch that never got a shape, at which tensor() crashes
            array = interpreter.tensor(index)()
        except ValueError:  # tensor() raises for a tensor with a shape and no memory
            continue
        start = _address(array)
        # Of a scalar the interpreter hands out a copy, somewhere else.
        if shape.size and array.nbytes and not model_start <= start < model_start + len(model):
            yield start, start + array.nbytes


def _address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def _covered_bytes(blocks: Iterable[tuple[int, int]]) -> int:
    """Bytes that lie in any block, with the gaps that alignment leaves.

    >>> _covered_bytes([(0, 100), (128, 200), (64, 150), (10000, 10004)])
    204
    """
    covered = 0
    reached = -_ALIGNMENT_BYTES
    for start, end in sorted(blocks):
        is_joined = start < reached + _ALIGNMENT_BYTES
        covered += max(end - (reached if is_joined else start), 0)
        reached = max(reached, end)
    return covered
