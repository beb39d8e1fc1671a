"""Keeps the chatter of other libraries off the terminal, and finds the line in it that the user needs."""

from __future__ import annotations

import ctypes
import io
import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

__all__ = ["error_summary", "first_line", "quiet", "silenced_native_stderr", "silenced_native_stdout"]

_STDOUT, _STDERR = 1, 2

# Read by litert-torch and by the native code below it, some of it at import.
_QUIET_ENVIRONMENT = {"LITERT_TORCH_SHOW_PROGRESS": "n", "TF_CPP_MIN_LOG_LEVEL": "3"}
_ANSI_ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


@contextmanager
def quiet() -> Iterator[io.StringIO]:
    """Hold back what Python code prints, warns or logs inside the block; everything is as before after it.

    Yields:
        The text that was printed, for `ToolError.stderr`.
    """
    printed = io.StringIO()
    before = {name: os.environ.get(name) for name in _QUIET_ENVIRONMENT}
    disabled_level = logging.root.manager.disable
    os.environ.update(_QUIET_ENVIRONMENT)
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(printed), redirect_stderr(printed):
            warnings.simplefilter("ignore")
            yield printed
    finally:
        logging.disable(disabled_level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def silenced_native_stderr() -> Iterator[None]:
    """Hold back what native code writes to the standard error: LiteRT announces its delegate there, for no one."""
    with _silenced(_STDERR):
        yield


@contextmanager
def silenced_native_stdout() -> Iterator[None]:
    """Hold back what native code writes to the standard output, through C's buffer or past it."""
    flush = ctypes.CDLL(None).fflush if os.name == "posix" else lambda _stream: 0
    flush(None)  # what was written before belongs to the user
    with _silenced(_STDOUT):
        try:
            yield
        finally:
            flush(None)


@contextmanager
def _silenced(descriptor: int) -> Iterator[None]:
    """Let a descriptor lead nowhere inside the block."""
    kept = os.dup(descriptor)
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, descriptor)
        os.close(null)
        yield
    finally:
        os.dup2(kept, descriptor)
        os.close(kept)


def error_summary(error: BaseException) -> str:
    """The type of `error` and the first line that it says, for errors of the user's own code.

    >>> error_summary(ValueError("too large"))
    'ValueError: too large'
    """
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def first_line(error: BaseException) -> str:
    """The first line of the innermost cause of `error`, without terminal colours; its type if it says nothing.

    Exporters wrap the cause in pages of advice on how to debug the exporter.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    for line in _ANSI_ESCAPE.sub("", str(error)).splitlines():
        if line.strip():
            return line.strip().rstrip(".")
    return type(error).__name__
