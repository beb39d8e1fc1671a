"""Boards over a real sshd on loopback."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from sepdeploy.bench.board_run import BoardOptions, Model, Work, run_on_board
from sepdeploy.bench.board_ssh import SshBoard, ssh_needs
from sepdeploy.bench.environment import cpu_name
from sepdeploy.bench.files import describe_file
from sepdeploy.cli.main import run
from sepdeploy.core.artifact import Precision
from sepdeploy.core.chain import Chain, ChainSum
from sepdeploy.core.conv import ConvSpec
from sepdeploy.core.files import sha256_of_file
from sepdeploy.core.measurement import Method
from sepdeploy.core.progress import Silent
from sepdeploy.core.selection import FusedBlock
from sepdeploy.core.ssh_address import SshAddress
from sepdeploy.errors import SepdeployError, ToolError, UsageError
from sepdeploy.planning.target import find_target

OPTIONS = BoardOptions(limit_seconds=60)


@pytest.fixture
def board(ssh_boards):
    """`board(name)` is one of the server's."""
    return lambda name: SshBoard(SshAddress(name), ssh_boards.config)


@pytest.fixture
def bench(ssh_boards):
    """`bench(board, files, ...)` runs the command and returns its exit code."""

    def bench(name, *arguments, seconds="0.01"):
        words = ["bench", *map(str, arguments), "--target", f"ssh://{name}", "--seconds", seconds]
        return run([*words, "--ssh-config", str(ssh_boards.config), "--json"])

    return bench


def test_files_are_timed_there(bench, ssh_boards, onnx_file, tflite_file, capsys):
    assert bench("native", onnx_file, tflite_file) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == [str(onnx_file), str(tflite_file)]
    for path, latency in found.items():
        assert latency["artifact_sha256"] == sha256_of_file(Path(path))
        assert latency["method"] == "measured time on this machine or a board"
        assert 0 < latency["minimum_ms"] <= latency["median_ms"] <= latency["p90_ms"]
        assert latency["repeats"] >= 24
        where, *noted = latency["environment"]["conditions"]
        assert where == "on ssh://native"
        assert [each for each in noted if "governor" in each]
        assert [each for each in noted if "throttl" in each.lower()]
    first, second = found.values()
    assert first["speedup"] is None
    assert second["speedup_low"] <= second["speedup"] <= second["speedup_high"]
    assert "onnxruntime" in first["environment"]["runtime"]
    assert "litert" in second["environment"]["runtime"]
    assert ssh_boards.left_behind("native") == []


def test_blocks_are_compared_there(board, ssh_boards, onnx_file, tmp_path):
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(b"no network")
    models = tuple(Model(path) for path in (onnx_file, onnx_file, damaged))
    same, wrong = run_on_board(board("native"), Work("differences", models, seconds=0.01), OPTIONS).outcome
    assert same["low_ms"] <= same["difference_ms"] <= same["high_ms"]
    assert same["reference_ms"] > 0
    assert "onnxruntime cannot load model-2.onnx" in wrong["reason"]
    assert wrong["is_lasting"]
    models = (models[2], models[0])
    (wrong,) = run_on_board(board("native"), Work("differences", models, seconds=0.01), OPTIONS).outcome
    assert wrong["is_of_reference"]


def test_file_names_never_reach_a_shell(bench, ssh_boards, onnx_file, tmp_path, monkeypatch, capsys):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    names = ["a b.onnx", "-oProxyCommand=touch pwned.onnx", "$(touch pwned).onnx", "`touch pwned`;touch pwned'\".onnx"]
    names.append("new\nline\ntouch pwned.onnx")
    for name in names:
        shutil.copy(onnx_file, name)
    assert bench("native", *(f"./{name}" for name in names)) == 0
    assert len(json.loads(capsys.readouterr().out)) == len(names)
    assert sorted(path.name for path in Path().iterdir()) == sorted(names)
    assert ssh_boards.left_behind("native") == []
    assert not list(Path.home().glob("pwned*"))


HOSTILE = (
    "ssh://-oProxyCommand=touch pwned",
    "ssh://-oProxyCommand=touch",
    "ssh://x@-oProxyCommand=touch",
    "ssh://-l@host",
    "ssh://host;touch pwned",
    "ssh://$(touch pwned)@host",
    "ssh://user@host:22;id",
    "ssh://host:0",
    "ssh://host:65536",
    "ssh://host:-1",
    "ssh://[-x]",
    "ssh://[::1",
    "ssh://us er@host",
    "ssh://host\nProxyCommand x",
    "ssh://host/path",
    "ssh://%h",
    "ssh://",
    "ssh:host",
    "ssh://a@b@c",
)


@pytest.mark.parametrize("target", HOSTILE)
def test_hostile_addresses(target, onnx_file, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("something was started"))
    assert run(["bench", str(onnx_file), "--target", target]) == 2
    assert "give ssh://user@host" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "address", "arguments"),
    [
        ("ssh://board", SshAddress("board"), ["--", "board"]),
        ("ssh://pi@10.0.0.7:2222/", SshAddress("10.0.0.7", "pi", 2222), ["-p", "2222", "-l", "pi", "--", "10.0.0.7"]),
        ("ssh://a.b-c_d@[fe80::1%eth0]:22", SshAddress("fe80::1%eth0", "a.b-c_d", 22), None),
    ],
)
def test_addresses(text, address, arguments):
    assert SshAddress.parse(text) == address
    assert SshAddress.parse(str(address)) == address
    assert arguments is None or address.arguments() == arguments


def test_what_ssh_is_told(board):
    command = board("native").command()
    for option in ("BatchMode=yes", "PasswordAuthentication=no", "StrictHostKeyChecking=yes", "ForwardAgent=no"):
        assert command[command.index(option) - 1] == "-o"
    assert command[-3:-1] == ["--", "native"]


REFUSALS = {
    "native-unknown": "its host key is not known; run ssh native-unknown once",
    "native-changed": "its host key is not the one that you know, so it may not be your board",
    "stranger": "it accepts none of your keys; run ssh-copy-id stranger",
    "pythonless": "there is no python3; run there: apt-get install python3",
    "bare": "numpy cannot be imported (No module named 'numpy'); run there: python3 -m pip install numpy",
}


@pytest.mark.parametrize("name", REFUSALS)
def test_boards_that_cannot_be_used(name, bench, ssh_boards, onnx_file, capsys):
    assert bench(name, onnx_file) == 4
    assert f"ssh://{name}: {REFUSALS[name]}" in capsys.readouterr().err
    if name in ssh_boards.boards:
        assert ssh_boards.left_behind(name) == []


def test_nothing_listens(onnx_file, ssh_boards, capsys):
    target = "ssh://native:1"
    assert run(["bench", str(onnx_file), "--target", target, "--ssh-config", str(ssh_boards.config)]) == 4
    assert "Connection refused; see whether ssh -p 1 native works" in capsys.readouterr().err


def test_an_emulated_board_is_told_apart(emulated_board, bench, board, ssh_boards, onnx_file, capsys):
    """The whole way through the arm64 root: all that is wrong with it are its times."""
    assert bench(emulated_board, onnx_file) == 4
    assert "runs under emulation (qemu-aarch64 on x86): times from there say nothing" in capsys.readouterr().err
    reply = run_on_board(
        board(emulated_board),
        Work("latencies", (Model(onnx_file),), seconds=0.01),
        BoardOptions(limit_seconds=120, is_emulation_allowed=True),
    )
    assert (reply.machine, reply.emulator) == ("aarch64", "qemu-aarch64 on x86")
    assert reply.environment["cpu"] == "Cortex-A72"
    assert reply.outcome[0]["artifact_sha256"] == sha256_of_file(onnx_file)
    assert ssh_boards.left_behind(emulated_board) == []


def test_login_scripts_may_talk(board):
    assert run_on_board(board("chatty"), Work("describe"), OPTIONS).outcome[".onnx"].startswith("onnxruntime")


def test_files_that_the_runtime_cannot_load(bench, tmp_path, capsys, ssh_boards):
    path = tmp_path / "damaged.onnx"
    path.write_bytes(b"no network")
    assert bench("native", path) == 2
    assert f"on ssh://native: onnxruntime cannot load {path}" in capsys.readouterr().err
    assert ssh_boards.left_behind("native") == []


def test_files_that_are_not_there(bench, tmp_path, capsys):
    assert bench("native", tmp_path / "no.onnx") == 2
    assert "no.onnx does not exist" in capsys.readouterr().err


@pytest.fixture
def sleeper(tmp_path):
    """A Python that takes a minute."""
    path = tmp_path / "sleeper"
    path.write_text("#!/bin/sh\nsleep 60\n")
    path.chmod(0o755)
    return str(path)


def test_the_time_limit_holds_there(board, ssh_boards, sleeper):
    with pytest.raises(
        ToolError, match=r"it took more than 0.2 s; where it was bench, give it more time with --time-limit"
    ):
        run_on_board(board("native"), Work("describe"), BoardOptions(limit_seconds=0.2, python=sleeper))
    assert ssh_boards.left_behind("native") == []
    assert ssh_boards.still_running("native") == []


def test_the_time_limit_holds_here(board, monkeypatch):
    monkeypatch.setattr("sepdeploy.bench.board_run._CONNECTION_SECONDS", 0.1)
    monkeypatch.setattr("sepdeploy.bench.board_run._SLOWEST_BYTES_PER_SECOND", 1e9)
    with pytest.raises(ToolError, match="did not answer within 1 s and was given up"):
        run_on_board(board("hanging"), Work("describe"), BoardOptions(limit_seconds=0.9))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopping_leaves_nothing_there(number, ssh_boards, onnx_file, sleeper):
    words = ["bench", str(onnx_file), "--target", "ssh://native", "--board-python", sleeper]
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # background jobs ignore it
        f"from sepdeploy.cli.main import main\nmain({[*words, '--ssh-config', str(ssh_boards.config)]!r})"
    )
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True) as process:
        _wait_until(lambda: ssh_boards.processes("native"))
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
    assert "Traceback" not in errors
    assert ssh_boards.left_behind("native") == []
    assert ssh_boards.still_running("native") == []


def _wait_until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_full_disk_there(board, ssh_boards, onnx_file):
    place = ssh_boards.boards["native"]
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "sepdeploy-test", str(place)], check=False, capture_output=True
        ).returncode
    ):
        pytest.skip("only root can mount a small disk")
    try:
        with pytest.raises(ToolError, match=r"No space left on device .*; free space there"):
            run_on_board(board("native"), Work("latencies", (Model(onnx_file),)), OPTIONS)
        assert ssh_boards.left_behind("native") == []
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_python_of_ones_own(board, ssh_boards, onnx_file, tmp_path):
    work = Work("latencies", (Model(onnx_file),), seconds=0.01)
    reply = run_on_board(board("bare"), work, BoardOptions(limit_seconds=60, python=sys.executable))
    assert reply.outcome[0]["repeats"] >= 24
    crashing = tmp_path / "python"
    crashing.write_text("#!/bin/sh\necho it fell over >&2\nkill -SEGV $$\n")
    crashing.chmod(0o755)
    with pytest.raises(ToolError, match="died of signal 11: it fell over"):
        run_on_board(board("native"), work, BoardOptions(limit_seconds=60, python=str(crashing)))
    with pytest.raises(UsageError, match="must be an absolute path"):
        BoardOptions(python="python3; touch pwned")
    assert ssh_boards.left_behind("native") == ssh_boards.left_behind("bare") == []


def test_what_a_board_needs(monkeypatch, ssh_boards):
    monkeypatch.setenv("SEPDEPLOY_SSH_CONFIG", str(ssh_boards.config))
    *_, runtime = needs = ssh_needs("ssh://native:ort")
    assert all(need.is_met for need in needs)
    assert "onnxruntime" in runtime.found
    *_, where = ssh_needs("ssh://native-unknown")
    assert where.problem == "its host key is not known"
    assert where.fix.startswith("run ssh native-unknown once")
    assert [need.name for need in ssh_needs("ssh://*")] == ["ssh"]
    with pytest.raises(SepdeployError):
        ssh_needs("ssh://-x")


def test_a_board_as_a_target(ssh_boards, monkeypatch, onnx_file):
    """What `plan` and `convert` do with one: prices of a layer's forms, and whole files against each other."""
    monkeypatch.setenv("SEPDEPLOY_SSH_CONFIG", str(ssh_boards.config))
    target = find_target("ssh://native:ort", Precision.FLOAT32, 1)
    key = target.key()
    assert (key["target"], key["threads"]) == ("ssh://native:ort", 1)
    assert key["cpu"] == f"{cpu_name()} at ssh://native"
    assert str(key["runtime"]).startswith("onnxruntime ")
    spec = ConvSpec(8, 8, (3, 3), padding=(1, 1, 1, 1))
    dense, thin = (
        FusedBlock(ChainSum((Chain((replace(spec, groups=groups).as_factor(),)),)), spec, (8, 8)) for groups in (1, 8)
    )
    (price,) = target.measure(dense, [thin], seconds=0.01, seed=0, progress=Silent())
    assert (price.unit, price.method) == ("ms", Method.WALL_CLOCK)
    assert price.difference_low <= price.difference <= price.difference_high
    file = describe_file(onnx_file)
    first, second = target.compare([file, file], seconds=0.01, seed=0)
    assert first.speedup is None
    assert second.speedup_low <= second.speedup <= second.speedup_high
    assert second.environment.conditions[0] == "on ssh://native"
    assert ssh_boards.left_behind("native") == []


@pytest.mark.parametrize("target", ["ssh://-oProxyCommand=x", "ssh://host:ort:ort", "ssh://"])
def test_targets_are_checked_before_anything_is_done(target, capsys):
    assert run(["convert", "model.pt", "--arch", "x", "--calibration", "x", "--target", target]) == 2
    assert "is no board: give ssh://user@host" in " ".join(capsys.readouterr().err.split())
