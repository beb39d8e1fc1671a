from __future__ import annotations

import ctypes
import logging
import os
import sys
import warnings

import pytest

from sepdeploy.core.quiet import first_line, quiet, silenced_native_stderr, silenced_native_stdout


def test_holds_everything_back_and_restores_it(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    environment = dict(os.environ)
    with quiet() as printed:
        print("progress")  # noqa: T201
        print("advice", file=sys.stderr)  # noqa: T201
        logging.getLogger("torch").error("not installed")
        warnings.warn("deprecated", DeprecationWarning, stacklevel=1)
    assert printed.getvalue() == "progress\nadvice\n"
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert dict(os.environ) == environment
    logging.getLogger("torch").error("heard again")
    assert caplog.messages == ["heard again"]


def test_restores_everything_after_an_error() -> None:
    environment, level = dict(os.environ), logging.root.manager.disable
    with pytest.raises(KeyError), quiet():
        raise KeyError
    assert (dict(os.environ), logging.root.manager.disable) == (environment, level)


def test_native_standard_error_is_held_back_and_restored(capfd: pytest.CaptureFixture[str]) -> None:
    with silenced_native_stderr():
        os.write(2, b"delegate created")
    os.write(2, b"heard again")
    assert capfd.readouterr().err == "heard again"


def test_native_standard_output_is_held_back_and_restored(capfd: pytest.CaptureFixture[str]) -> None:
    libc = ctypes.CDLL(None)
    libc.printf(b"before, ")
    with silenced_native_stdout():
        libc.printf(b"a solution is repaired")  # stays in C's buffer
        os.write(1, b"and past the buffer")
    libc.printf(b"after")
    libc.fflush(None)
    assert capfd.readouterr().out == "before, after"


def test_first_line_is_that_of_the_innermost_cause() -> None:
    error = RuntimeError("export failed, next steps:")
    error.__cause__ = ValueError("\n\x1b[96mno kernel for svd.\x1b[0m\nsee page 2")
    assert first_line(error) == "no kernel for svd"
    assert first_line(KeyError()) == "KeyError"
