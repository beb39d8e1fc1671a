"""Errors of the moment: another try may go well."""

from __future__ import annotations

import errno
from collections.abc import Iterator

from sepdeploy.errors import SepdeployError

__all__ = ["is_out_of_memory", "is_passing", "sounds_passing"]

_MEMORY_PHRASES = (
    "allocate memory",
    "allocate buffer",
    "bad_alloc",
    "bad allocation",
    "out of memory",
    "not enough memory",
    "status_alloc_failed",
)
"""What native code says where memory is short: torch on the CPU and on GPUs, cuDNN and cuBLAS, the runtimes."""

_PASSING_PHRASES = (
    *_MEMORY_PHRASES,
    "no space left",
    "quota exceeded",
    "input/output error",
    "too many open files",
    "resource temporarily unavailable",
    "timed out",
)
"""What native code says of a machine that is short of something; from there an error comes as its text alone."""


def is_passing(error: BaseException) -> bool:
    """Whether an error is of the moment (a full disk, no memory, a package that is missing), not of what was asked for.

    Everything that led to it counts.

    >>> is_passing(ValueError("no such operator"))
    False
    """
    return any(
        isinstance(each, (OSError, MemoryError, ImportError)) or sounds_passing(str(each)) for each in _led_to(error)
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error comes from this process being short of memory, on the CPU or on a GPU.

    Everything that led to it counts, but not what our own errors say, which may be about another machine, nor the
    names of files.

    >>> is_out_of_memory(RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    True
    """
    for each in _led_to(error):
        if isinstance(each, MemoryError) or (isinstance(each, OSError) and each.errno == errno.ENOMEM):
            return True
        if not isinstance(each, (SepdeployError, OSError)) and _says(str(each), _MEMORY_PHRASES):
            return True
    return False


def sounds_passing(text: str) -> bool:
    """The same as `is_passing`, of an error that is known by its message.

    >>> sounds_passing("[Errno 28] No space left on device")
    True
    """
    return _says(text, _PASSING_PHRASES)


def _led_to(error: BaseException) -> Iterator[BaseException]:
    """The error and all that it came from."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)


def _says(text: str, phrases: tuple[str, ...]) -> bool:
    return any(phrase in text.lower() for phrase in phrases)
