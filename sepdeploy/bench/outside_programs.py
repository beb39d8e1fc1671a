"""Runs outside programs: with a time limit, and ended together with all that they started."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from sepdeploy.errors import ToolError

__all__ = ["Finished", "end_group", "ended_by_signals", "find_program", "last_line", "run_program"]

_ENDING = (signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class Finished:
    """How a program ended.

    Attributes:
        code: Exit code; minus the signal's number if a signal ended it.
        output: What it wrote to standard output.
        errors: What it wrote to standard error.
    """

    code: int
    output: str
    errors: str


def find_program(name: str) -> str | None:
    """Where the program is on PATH; None if it is not."""
    return shutil.which(name)


def run_program(
    command: Sequence[str], *, limit_seconds: float, purpose: str, environment: dict[str, str] | None = None
) -> Finished:
    """Run a program without a shell and wait for its end.

    It leads a process group of its own, which is killed at the limit and on any exception, Ctrl-C above all.

    Args:
        command: Name or path, and arguments.
        limit_seconds: How long it may take.
        purpose: What it does for the user, for messages: 'building the image'.
        environment: Its environment; None is that of this process.

    Raises:
        ToolError: if it cannot be started or takes too long.
    """
    try:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
            env=environment,
        )
    except OSError as error:
        raise ToolError(f"{purpose}: {Path(command[0]).name} cannot be started: {error.strerror or error}") from error
    try:
        output, errors = process.communicate(timeout=limit_seconds)
    except subprocess.TimeoutExpired as error:
        raise ToolError(
            f"{purpose} took more than {limit_seconds:g} s and was stopped: {Path(command[0]).name} does not answer"
        ) from error
    finally:
        end_group(process)
    return Finished(process.returncode, output, errors)


def end_group(process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> None:
    """Kill what is left of the process group that `process` leads, and wait for `process`."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            with suppress(OSError):  # a pipe that nobody reads any more
                stream.close()
    process.wait()


def last_line(text: str) -> str:
    """The last line of `text` that says something; programs end with what went wrong.

    >>> last_line(f"starting{chr(10)}no space left{chr(10)}")
    'no space left'
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise `SystemExit` inside the block, so that everything is cleaned up as on Ctrl-C.

    Where signals cannot be caught (outside the main thread) nothing changes.
    """

    def stop(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    try:
        before = {number: signal.signal(number, stop) for number in _ENDING}
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
