"""Runs a job on a board that some command reaches: sends the bench program and files, brings the result back.

What runs there is `board_boot.py`, whose text goes over standard input, as does everything else: the remote command
is a constant, and files have names of our own, so nothing that a user named is ever read by a shell.
"""

from __future__ import annotations

import importlib.util
import io
import json
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sepdeploy.bench.board_agent import JOB_FILE
from sepdeploy.bench.board_connection import Connection
from sepdeploy.bench.files import format_of
from sepdeploy.bench.outside_programs import last_line
from sepdeploy.bench.self_contained import self_contained
from sepdeploy.core.files import sha256_of_file
from sepdeploy.errors import ContractError, SepdeployError, ToolError, UsageError

__all__ = [
    "PYTHON_PROGRAM",
    "Board",
    "BoardOptions",
    "BoardReply",
    "Model",
    "Work",
    "emulated_error",
    "model_name",
    "run_on_board",
    "understood",
]

PYTHON_PROGRAM = "import sys;exec(sys.stdin.buffer.read(int(sys.stdin.buffer.readline())))"
"""What python3 is told to run there. No character in it means anything to a shell inside double quotes."""

_PROGRAM_FILE = "program.zip"
_MODULES = (
    "sepdeploy",
    "sepdeploy.version",
    "sepdeploy.errors",
    "sepdeploy.core",
    "sepdeploy.core.files",
    "sepdeploy.core.measurement",
    "sepdeploy.core.passing_errors",
    "sepdeploy.core.quiet",
    "sepdeploy.bench",
    "sepdeploy.bench.board_agent",
    "sepdeploy.bench.board_state",
    "sepdeploy.bench.differences",
    "sepdeploy.bench.emulation",
    "sepdeploy.bench.environment",
    "sepdeploy.bench.litert",
    "sepdeploy.bench.onnxruntime",
    "sepdeploy.bench.session",
    "sepdeploy.bench.timing",
)
"""What the bench program imports; a test runs it with nothing else."""

_MAIN = "from sepdeploy.bench.board_agent import main\n\nmain()\n"
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
_CONNECTION_SECONDS = 60.0
_SLOWEST_BYTES_PER_SECOND = 100_000

_RUNTIMES = ("numpy", "onnxruntime", "ai-edge-litert")


class Board(Protocol):
    """Where python3 can be run."""

    @property
    def name(self) -> str:
        """As on the command line."""

    def command(self) -> list[str]:
        """Program and arguments that run `python3 -c PYTHON_PROGRAM` there, with our standard streams."""

    def explain(self, code: int, errors: str) -> ToolError:
        """What went wrong and what to do, where the command ended with `code` before python3 said anything."""


@dataclass(frozen=True, slots=True)
class BoardOptions:
    """How jobs run on a board.

    Attributes:
        limit_seconds: How long a job may take there, once everything has been sent.
        python: Python to run it with, an absolute path there; None is python3.
        wheels: Wheels to unpack there first, where numpy and a runtime are not installed.
        is_emulation_allowed: Whether to go on where the board is emulated. Times from there are of no use.
    """

    limit_seconds: float = 600.0
    python: str | None = None
    wheels: tuple[Path, ...] = ()
    is_emulation_allowed: bool = False

    def __post_init__(self) -> None:
        if self.python is not None and not self.python.startswith("/"):
            raise UsageError(f"the board's Python must be an absolute path there, such as /usr/bin/python3, got "
                             f"{self.python!r}")  # fmt: skip
        if not self.limit_seconds > 0:
            raise UsageError(f"the time limit must be positive, got {self.limit_seconds:g} s")


@dataclass(frozen=True, slots=True)
class Model:
    """A file to send.

    Attributes:
        path: An .onnx or .tflite file.
        is_channels_last: Whether it takes and returns NHWC where the PyTorch network has NCHW.
    """

    path: Path
    is_channels_last: bool = False


@dataclass(frozen=True, slots=True)
class Work:
    """A job; see `board_agent.py`.

    Attributes:
        kind: 'latencies', 'differences' or 'describe'.
        models: Files, the reference first.
        threads: Threads of the runtime.
        seconds: Time to spend on each file.
        seed: Seed of the random inputs.
    """

    kind: str
    models: tuple[Model, ...] = ()
    threads: int = 1
    seconds: float = 1.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class BoardReply:
    """What came back.

    Attributes:
        python: Version of the board's Python.
        machine: What `uname -m` says there.
        emulator: What the board is emulated by; None if nothing says that it is.
        environment: Fields of an `Environment` without the runtime.
        conditions: What else bears on times, as phrases.
        sent_sha256: Hashes of the files as they were sent.
        outcome: As JSON: of 'latencies' and 'differences' one item per file, of 'describe' the runtimes by suffix.
    """

    python: tuple[int, ...]
    machine: str
    emulator: str | None
    environment: Mapping[str, Any]
    conditions: tuple[str, ...]
    sent_sha256: tuple[str, ...]
    outcome: Any


def model_name(place: int, path: Path) -> str:
    """Name on the board of the file that is sent as number `place`."""
    return f"model-{place}.{format_of(path).value}"


def run_on_board(board: Board, work: Work, options: BoardOptions) -> BoardReply:
    """Send a job with its files, wait for the result.

    The board removes everything at the end, at the time limit, and when the connection ends, as it does when this
    process is stopped.

    Raises:
        UsageError: if a file is missing, or the board's runtime cannot load it.
        ToolError: if the board cannot be reached, lacks something, is emulated, or the job fails there.
    """
    with tempfile.TemporaryDirectory(prefix="sepdeploy-") as folder:
        return _run(board, work, options, Path(folder))


def _run(board: Board, work: Work, options: BoardOptions, folder: Path) -> BoardReply:
    files = _files(work, options, folder)
    names = {model_name(place, model.path): str(model.path) for place, model in enumerate(work.models)}
    size = sum(len(data) if isinstance(data, bytes) else data.stat().st_size for data in files.values())
    limit_seconds = _CONNECTION_SECONDS + options.limit_seconds + size / _SLOWEST_BYTES_PER_SECOND
    with Connection(board.command(), limit_seconds) as connection:
        connection.send(_sent(files, options))
        events = list(connection.events())
    sent = tuple(sha256_of_file(data) for name, data in files.items() if name in names and isinstance(data, Path))
    with understood(board.name):
        reply = _reply(board, events, connection, names, sent, options)
        _require_whole(work, reply)
    return reply


@contextmanager
def understood(name: str) -> Iterator[None]:
    """Make one sentence of what is wrong with the answer of a board, inside the block.

    Raises:
        ToolError: where something is missing, or of another kind or length.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ToolError(
            f"{name} answered something that sepdeploy does not understand; is another program in the place of its "
            "python3?"
        ) from error


def _require_whole(work: Work, reply: BoardReply) -> None:
    """Raise TypeError where something in the reply is missing or of another kind."""
    expected: type = dict if work.kind == "describe" else list
    is_described = isinstance(reply.environment, dict) and {"cpu", "cores"} <= reply.environment.keys()
    if not isinstance(reply.outcome, expected) or not is_described:
        raise TypeError(f"no whole reply to {work.kind}")


def _files(work: Work, options: BoardOptions, folder: Path) -> dict[str, bytes | Path]:
    """What is sent: name there -> content; what has to be made for it goes into `folder`."""
    job = {
        "work": work.kind,
        "models": [[model_name(i, model.path), model.is_channels_last] for i, model in enumerate(work.models)],
        "threads": work.threads,
        "seconds": work.seconds,
        "seed": work.seed,
        "is_emulation_allowed": options.is_emulation_allowed,
    }
    files: dict[str, bytes | Path] = {f"wheel-{i}.whl": path for i, path in enumerate(options.wheels)}
    files |= {_PROGRAM_FILE: _program(), JOB_FILE: json.dumps(job).encode()}
    for path in (*options.wheels, *(model.path for model in work.models)):
        if not path.is_file():
            raise UsageError(f"{path} does not exist or is not a file")
    for i, model in enumerate(work.models):
        own = folder / str(i)
        own.mkdir()
        files[model_name(i, model.path)] = self_contained(model.path, own)
    return files


def _program() -> bytes:
    """The bench program as a zip file that Python runs."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for module in _MODULES:
            archive.writestr(*_source(module))
        archive.writestr("__main__.py", _MAIN)
    return content.getvalue()


def _source(module: str) -> tuple[str, bytes]:
    """Path in the zip file and text of a module of ours."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ContractError(f"the source of {module} cannot be found")
    stem = module.replace(".", "/")
    is_package = spec.submodule_search_locations is not None
    return f"{stem}/__init__.py" if is_package else f"{stem}.py", Path(spec.origin).read_bytes()


def _sent(files: Mapping[str, bytes | Path], options: BoardOptions) -> Iterator[bytes]:
    """Everything that goes over standard input, in order."""
    boot = _source("sepdeploy.bench.board_boot")[1]
    yield f"{len(boot)}\n".encode() + boot
    sizes = [(name, len(data) if isinstance(data, bytes) else data.stat().st_size) for name, data in files.items()]
    header = {
        "files": sizes,
        "limit_s": options.limit_seconds,
        "python": options.python,
        "program": _PROGRAM_FILE,
        "environment": _ONE_THREAD,
    }
    yield json.dumps(header).encode() + b"\n"
    for data in files.values():
        if isinstance(data, bytes):
            yield data
        else:
            with data.open("rb") as file:
                while block := file.read(1 << 20):
                    yield block


def _reply(
    board: Board,
    events: Sequence[dict[str, Any]],
    connection: Connection,
    names: Mapping[str, str],
    sent: tuple[str, ...],
    options: BoardOptions,
) -> BoardReply:
    """The result among `events`, or the error that they amount to."""
    if connection.is_overdue:
        raise ToolError(f"{board.name} did not answer within {connection.limit_seconds:.0f} s and was given up")
    if not events:
        raise board.explain(connection.code, connection.errors)
    start = events[0]
    for event in events:
        if event["event"] == "error":
            raise _error(board, event, start, connection.errors, names)
    result = next((event for event in events if event["event"] == "result"), None)
    if result is None:
        raise ToolError(
            f"the connection to {board.name} ended before there was a result: {last_line(connection.errors)}",
            stderr=connection.errors,
        )
    if result["emulator"] is not None and not options.is_emulation_allowed:
        raise emulated_error(board.name, result["emulator"])
    return BoardReply(
        python=tuple(start["python"]),
        machine=start["machine"],
        emulator=result["emulator"],
        environment=result["environment"],
        conditions=tuple(result["conditions"]),
        sent_sha256=sent,
        outcome=result["outcome"],
    )


def emulated_error(name: str, emulator: str) -> ToolError:
    """Why there are no times from an emulated board."""
    return ToolError(
        f"{name} runs under emulation ({emulator}): times from there say nothing about any processor; use a real "
        "board, or --target cortex-a72 for counted instructions"
    )


def _error(
    board: Board, event: Mapping[str, Any], start: Mapping[str, Any], errors: str, names: Mapping[str, str]
) -> SepdeployError:
    """An error that the board told of."""
    message = str(event["message"])
    for there, here in names.items():
        message = message.replace(there, here)
    if event["kind"] == "UsageError":
        return UsageError(f"on {board.name}: {message}")
    said = last_line(errors) if errors.strip() else ""
    advice = {
        "limit": "; where it was bench, give it more time with --time-limit, or measure less with --seconds",
        "crash": f": {said}" if said else "; another version of the runtime may help",
        "disk": "; free space there",
        "python": "; install a newer one and name it in SEPDEPLOY_BOARD_PYTHON, or for bench with --board-python",
        "ToolError": f"; {_installation(start)}"
        if "not installed" in message or "cannot be imported" in message
        else "",
    }.get(str(event["kind"]), "")
    return ToolError(f"{board.name}: {message}{advice}", stderr=errors)


def _installation(start: Mapping[str, Any]) -> str:
    """How the board comes by numpy and a runtime."""
    version = ".".join(map(str, start["python"]))
    machine = start["machine"]
    platforms = " ".join(f"--platform {tag}_{machine}" for tag in ("manylinux_2_28", "manylinux_2_17", "manylinux2014"))
    return (
        f"run there: python3 -m pip install {' '.join(_RUNTIMES)}; or here: pip download --no-deps --only-binary=:all: "
        f"--python-version {version} {platforms} --dest wheels {' '.join(_RUNTIMES)}, then add --board-wheels wheels "
        "(bench only); a Python there that has them can be named in SEPDEPLOY_BOARD_PYTHON"
    )
