"""Errors of the moment: another try may go well."""

from __future__ import annotations

__all__ = ["is_passing", "sounds_passing"]

_PASSING_PHRASES = (
    "no space left",
    "quota exceeded",
    "input/output error",
    "too many open files",
    "allocate memory",
    "allocate buffer",
    "bad_alloc",
    "bad allocation",
    "out of memory",
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
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (OSError, MemoryError, ImportError)) or sounds_passing(str(cause)):
            return True
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return False


def sounds_passing(text: str) -> bool:
    """The same, of an error that is known by its message.

    >>> sounds_passing("[Errno 28] No space left on device")
    True
    """
    return any(phrase in text.lower() for phrase in _PASSING_PHRASES)
