"""Keeps the chatter of the quantizers off the terminal."""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

__all__ = ["quiet", "silenced_native_stderr"]

_STDERR = 2


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back what Python code prints, warns or logs inside the block; everything is as before after it."""
    disabled_level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled_level)


@contextmanager
def silenced_native_stderr() -> Iterator[None]:
    """Hold back what native code writes to the standard error: LiteRT announces its delegate there, for no one."""
    kept = os.dup(_STDERR)
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, _STDERR)
        os.close(null)
        yield
    finally:
        os.dup2(kept, _STDERR)
        os.close(kept)
