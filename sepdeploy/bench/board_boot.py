"""Runs on a board, in any Python from 3.7 on: unpacks what standard input brings, runs it, leaves nothing behind.

`board_run.py` sends the text of this file, then a line of JSON, then files. Lines of JSON come back. The bench program
runs in a child, so that this process can end it and remove its folder: at the time limit, on a signal, and when
standard input closes, which is how the end of the connection shows.
"""

from __future__ import annotations

import sys

sys.path[:] = [place for place in sys.path if place]  # not the home folder: a numpy.py may lie there

import json  # noqa: E402
import os  # noqa: E402
import re  # noqa: E402
import runpy  # noqa: E402
import select  # noqa: E402
import shutil  # noqa: E402
import signal  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
import zipfile  # noqa: E402
from typing import Any, BinaryIO, NoReturn, TextIO  # noqa: E402

MAGIC = "sepdeploy-board-1"
_OLDEST = (3, 10)
_BLOCK_BYTES = 1 << 20
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_SITE = "site"


def main(source: BinaryIO, sink: TextIO) -> None:
    """Do what the header on `source` says; what comes of it goes to `sink` as lines of JSON."""
    folder = None
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, _stop)
    _say(sink, "start", magic=MAGIC, python=list(sys.version_info[:2]), machine=os.uname().machine)
    try:
        header = json.loads(source.readline())
        if sys.version_info[:2] < _OLDEST and not header["python"]:
            version = ".".join(map(str, sys.version_info[:2]))
            _say(sink, "error", kind="python", message=f"its python3 is {version}, and 3.10 or newer is needed")
            return
        folder = tempfile.mkdtemp(prefix="sepdeploy-")
        _receive(source, header["files"], folder)
        _supervise(source, sink, header, folder)
    except OSError as error:
        _say(sink, "error", kind="disk", message=f"{error.strerror or error} ({error.filename or folder})")
    finally:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # a second one must not end the cleaning up
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
            _say(sink, "end", left=os.path.exists(folder))  # noqa: PTH110


def _stop(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)


def _say(sink: TextIO, event: str, **facts: object) -> None:
    try:
        sink.write(json.dumps(dict(facts, event=event)) + "\n")
        sink.flush()
    except OSError:  # nobody listens any more; what is left to do is done all the same
        pass


def _receive(source: BinaryIO, files: list[tuple[str, int]], folder: str) -> None:
    """Write the files that follow the header, and unpack wheels into the folder `site`."""
    for name, size in files:
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name that a sender gives")
        path = os.path.join(folder, name)  # noqa: PTH118
        with open(path, "wb") as file:  # noqa: PTH123
            while size > 0:
                block = source.read(min(size, _BLOCK_BYTES))
                if not block:
                    raise SystemExit("the connection ended")
                file.write(block)
                size -= len(block)
        if name.endswith(".whl"):
            with zipfile.ZipFile(path) as wheel:
                wheel.extractall(os.path.join(folder, _SITE))  # noqa: PTH118
            os.unlink(path)  # noqa: PTH108


def _supervise(source: BinaryIO, sink: TextIO, header: dict[str, Any], folder: str) -> None:
    """Run the bench program in a child until it ends, the time is over or the connection ends."""
    alive, held = os.pipe()
    os.set_inheritable(held, True)
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        _run_child(header, folder)
    os.close(held)
    end = time.monotonic() + header["limit_s"]
    try:
        ready, _, _ = select.select([alive, source.fileno()], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            _say(sink, "error", kind="limit", message=f"it took more than {header['limit_s']:g} s")
            return
        if alive not in ready:
            return  # the sender has gone
        _, status = os.waitpid(child, 0)
        child = 0
        if os.WIFSIGNALED(status):
            _say(sink, "error", kind="crash", message=f"the bench program died of signal {os.WTERMSIG(status)}")
        elif os.WEXITSTATUS(status):
            _say(sink, "error", kind="crash", message=f"the bench program ended with code {os.WEXITSTATUS(status)}")
    finally:
        if child:
            _end(child)


def _end(child: int) -> None:
    try:
        os.killpg(child, signal.SIGKILL)
    except OSError:
        os.kill(child, signal.SIGKILL)  # it has not made its group yet
    os.waitpid(child, 0)


def _run_child(header: dict[str, Any], folder: str) -> NoReturn:
    """The rest of this function's process is the bench program."""
    code = 70
    try:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        os.chdir(folder)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        site = os.path.join(folder, _SITE)  # noqa: PTH118
        os.environ.update(header["environment"])
        os.environ["TMPDIR"] = folder  # runtimes leave files of their own there
        if header["python"]:
            path = os.pathsep.join(place for place in (site, os.environ.get("PYTHONPATH")) if place)
            os.environ["PYTHONPATH"] = path
            os.execv(header["python"], [header["python"], header["program"]])
        sys.path.insert(0, site)
        sys.argv[:] = [header["program"]]
        runpy.run_path(header["program"], run_name="__main__")
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main(sys.stdin.buffer, sys.stdout)
