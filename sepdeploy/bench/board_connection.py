"""The process through which a board is reached: what is sent to it, what it says, and its end."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO, Any

from sepdeploy.bench.board_boot import MAGIC
from sepdeploy.bench.outside_programs import end_group
from sepdeploy.errors import ContractError, ToolError

__all__ = ["Connection"]

_KEPT_ERRORS = 64 * 1024


@dataclass
class Connection:
    """The process that reaches a board; leaving the block ends it, and with it what runs on the board.

    Attributes:
        command: Program and arguments.
        limit_seconds: How long it may take.
        code: Its exit code, once there are no more events.
        errors: The end of what it wrote to standard error.
        is_overdue: Whether it was ended because the time was over.
    """

    command: Sequence[str]
    limit_seconds: float
    code: int = 0
    errors: str = ""
    is_overdue: bool = False
    _process: subprocess.Popen[bytes] | None = None
    _threads: list[threading.Thread] = field(default_factory=list)
    _timer: threading.Timer | None = None

    def __enter__(self) -> Connection:
        try:
            self._process = subprocess.Popen(
                list(self.command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            raise ToolError(
                f"{self.command[0]} cannot be started: {error.strerror or error}; see sepdeploy doctor"
            ) from error
        self._timer = threading.Timer(self.limit_seconds, self._expire)
        self._timer.daemon = True
        self._timer.start()
        self._start(self._collect_errors, _stream(self._process.stderr))
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._process is not None:
            end_group(self._process)

    def send(self, pieces: Iterator[bytes]) -> None:
        """Begin to write to the board; its standard input stays open until the end."""

        def write(stream: IO[bytes]) -> None:
            with suppress(OSError, ValueError):  # it has ended: what it said tells why
                for piece in pieces:
                    stream.write(piece)
                stream.flush()

        self._start(write, _stream(self._process.stdin if self._process else None))

    def events(self) -> Iterator[dict[str, Any]]:
        """What the board says, line by line; whatever a login script says before is passed over."""
        process = self._process
        if process is None:
            raise ContractError("the connection is not open")
        has_begun = False
        for line in _stream(process.stdout):
            event = _parsed(line)
            has_begun |= event is not None and event.get("magic") == MAGIC
            if has_begun and event is not None:
                yield event
                if event["event"] == "end":
                    break
        with suppress(OSError):
            _stream(process.stdin).close()
        self.code = process.wait()
        self._threads[0].join(timeout=5)

    def _start(self, function: Callable[[IO[bytes]], None], stream: IO[bytes]) -> None:
        thread = threading.Thread(target=function, args=(stream,), daemon=True)
        self._threads.append(thread)
        thread.start()

    def _collect_errors(self, stream: IO[bytes]) -> None:
        with suppress(OSError, ValueError):
            for line in stream:
                self.errors = (self.errors + line.decode(errors="replace"))[-_KEPT_ERRORS:]

    def _expire(self) -> None:
        self.is_overdue = True
        if self._process is not None:
            self._process.kill()


def _stream(stream: IO[bytes] | None) -> IO[bytes]:
    if stream is None:
        raise ContractError("the process was started without pipes")
    return stream


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None
