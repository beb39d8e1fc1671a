"""The bench program is complete, and the far end cleans up by itself."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest

from sepdeploy.bench import board_connection, board_run
from sepdeploy.bench.board_files import time_files_on_board
from sepdeploy.bench.board_run import PYTHON_PROGRAM, BoardOptions, Model, Work, run_on_board
from sepdeploy.core.files import sha256_of_file
from sepdeploy.errors import ToolError, UsageError


class Here:
    """A board that is a process on this machine, started through /bin/sh as sshd does."""

    name = "here"

    def __init__(self, folder: Path, python: str = sys.executable, before: str = "") -> None:
        self.folder, self.python, self.before = folder, python, before

    def command(self) -> list[str]:
        return ["env", f"TMPDIR={self.folder}", "sh", "-c", f'{self.before}exec {self.python} -c "{PYTHON_PROGRAM}"']

    def explain(self, code: int, errors: str) -> ToolError:
        return ToolError(f"code {code}: {errors}")


@pytest.fixture
def here(tmp_path):
    return Here(tmp_path)


def test_the_program_needs_numpy_and_the_runtime_alone(onnx_file, tmp_path):
    """Without site packages, with only those two folders beside the standard library, on a path of links."""
    for module in (np, onnxruntime):
        (tmp_path / module.__name__).symlink_to(Path(module.__file__).parent)
    libraries = Path(np.__file__).parents[1] / "numpy.libs"
    if libraries.exists():
        (tmp_path / libraries.name).symlink_to(libraries)
    (tmp_path / "program.zip").write_bytes(board_run._program())
    (tmp_path / "model-0.onnx").write_bytes(onnx_file.read_bytes())
    job = {
        "work": "latencies", "models": [["model-0.onnx", False]], "threads": 1, "seconds": 0.01, "seed": 0,
        "is_emulation_allowed": False,
    }  # fmt: skip
    (tmp_path / "job.json").write_text(json.dumps(job))
    done = subprocess.run(
        [sys.executable, "-S", "program.zip"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    event = json.loads(done.stdout.splitlines()[-1])
    assert event["event"] == "result"
    assert event["outcome"][0]["repeats"] >= 24


def test_the_program_is_as_old_a_python_as_it_says():
    """What is sent first says that a Python is too old, so it must run in one; syntax is checked as of 3.7."""
    import ast

    source = Path(board_run.__file__).with_name("board_boot.py").read_text()
    ast.parse(source, feature_version=(3, 7))
    archive = zipfile.ZipFile(io.BytesIO(board_run._program()))
    for name in archive.namelist():
        ast.parse(archive.read(name), feature_version=(3, 10))


def test_wheels_are_unpacked_for_the_program(here, tmp_path, onnx_file):
    wheel = tmp_path / "sent" / "mine-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("numpy.py", "raise ImportError('this is the one that was sent')")
    board = Here(tmp_path / "board")
    board.folder.mkdir()
    with pytest.raises(ToolError, match="the one that was sent"):
        run_on_board(board, Work("latencies", (Model(onnx_file),)), BoardOptions(wheels=(wheel,)))
    assert list(board.folder.iterdir()) == []


def test_weights_in_other_files_are_sent_too(here, onnx_file, tmp_path):
    path = tmp_path / "split.onnx"
    onnx.save(onnx.load(onnx_file), path, save_as_external_data=True, location="its weights", size_threshold=0)
    (latency,) = time_files_on_board(here, [Model(path)], threads=1, seconds=0.01, seed=0, options=BoardOptions())
    assert latency.artifact_sha256 == sha256_of_file(path)
    (tmp_path / "its weights").unlink()
    with pytest.raises(UsageError, match=r"the weights that .*split.onnx keeps in other files cannot be put into it"):
        run_on_board(here, Work("latencies", (Model(path),)), BoardOptions())


def test_the_home_folder_is_not_where_modules_come_from(tmp_path, onnx_file):
    for name in ("json.py", "numpy.py", "tempfile.py"):
        (tmp_path / name).write_text("raise SystemExit('imported from the home folder')")
    board = Here(tmp_path, before=f"cd {tmp_path}; ")
    assert ".onnx" in run_on_board(board, Work("describe"), BoardOptions()).outcome


def test_an_emulated_board_gives_no_times(here, onnx_file, monkeypatch):
    def reply(*_):
        return board_run.BoardReply((3, 11), "aarch64", "qemu-aarch64 on x86", {}, (), ("",), [{}])

    monkeypatch.setattr("sepdeploy.bench.board_files.run_on_board", reply)
    with pytest.raises(ToolError, match=r"runs under emulation .*say nothing about any processor"):
        time_files_on_board(
            here, [Model(onnx_file)], threads=1, seconds=1, seed=0, options=BoardOptions(is_emulation_allowed=True)
        )


def test_a_board_that_breaks_off(here, tmp_path):
    script = tmp_path / "python"
    script.write_text('#!/bin/sh\necho \'{"event": "start", "magic": "sepdeploy-board-1", "python": [3, 11], '
                      '"machine": "x"}\'\necho lost power >&2\n')  # fmt: skip
    script.chmod(0o755)
    with pytest.raises(ToolError, match="the connection to here ended before there was a result: lost power"):
        run_on_board(Here(tmp_path, str(script)), Work("describe"), BoardOptions())


def test_a_board_that_speaks_of_something_else(tmp_path):
    with pytest.raises(ToolError, match="code 3: strange"):
        run_on_board(Here(tmp_path, "true", "echo strange >&2; exit 3; "), Work("describe"), BoardOptions())


def test_an_old_python(here, tmp_path, monkeypatch):
    source = Path(board_run.__file__).with_name("board_boot.py").read_text()
    future = source.replace("_OLDEST = (3, 10)", "_OLDEST = (9, 0)").encode()
    assert future != source.encode()
    real = board_run._source
    monkeypatch.setattr(
        board_run, "_source", lambda module: ("boot.py", future) if module.endswith("boot") else real(module)
    )
    with pytest.raises(ToolError, match=r"its python3 is 3\.\d+, and 3.10 or newer is needed; install a newer one"):
        run_on_board(here, Work("describe"), BoardOptions())


@pytest.mark.parametrize("limit", [0, -1.0])
def test_limits(limit):
    with pytest.raises(UsageError, match="time limit must be positive"):
        BoardOptions(limit_seconds=limit)


def test_a_client_that_is_not_there(tmp_path, here, monkeypatch):
    monkeypatch.setattr(Here, "command", lambda self: [str(tmp_path / "none")])
    with pytest.raises(ToolError, match="none cannot be started: No such file"):
        run_on_board(here, Work("describe"), BoardOptions())


def test_no_descriptor_is_left(here):
    run_on_board(here, Work("describe"), BoardOptions())
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0  # noqa: PTH208
    for _ in range(3):
        run_on_board(here, Work("describe"), BoardOptions())
    after = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0  # noqa: PTH208
    assert after <= before


WHOLE = {"environment": {"cpu": "x", "cores": 1}, "conditions": []}


@pytest.mark.parametrize(
    ("event", "outcome"),
    [({}, None), ({"environment": {}, "conditions": []}, []), (WHOLE, 3), (WHOLE, [])],
)
def test_a_reply_that_nobody_understands(onnx_file, tmp_path, event, outcome):
    start = {"event": "start", "magic": board_connection.MAGIC, "python": [3, 11, 2], "machine": "x"}
    result = {"event": "result", "emulator": None, "outcome": outcome, **event} if event else {"event": "result"}
    reply = tmp_path / "reply"
    reply.write_text("".join(f"{json.dumps(each)}\n" for each in (start, result, {"event": "end"})))
    board = SimpleNamespace(name="ssh://odd", command=lambda: ["sh", "-c", f"cat {reply}; cat >/dev/null"])
    with pytest.raises(ToolError, match="ssh://odd answered something that sepdeploy does not understand"):
        time_files_on_board(board, [Model(onnx_file)], threads=1, seconds=0.1, seed=0, options=BoardOptions())
