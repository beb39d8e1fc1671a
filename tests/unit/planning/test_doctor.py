"""`sepdeploy doctor`, on machines that lack everything in turn."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sepdeploy.bench.board_run import BoardReply
from sepdeploy.cli.main import run
from sepdeploy.core.readiness import Need, Readiness
from sepdeploy.errors import UsageError
from sepdeploy.planning import local_target
from sepdeploy.planning.doctor import DEFAULT_TARGETS, DOCTORS, examine
from sepdeploy.planning.target import TARGETS_BY_NAME

Install = Callable[..., None]

QEMU = "echo 'qemu-aarch64 version 7.2.19'; echo '-plugin  QEMU_PLUGIN'"
COMPLETE = {
    "qemu-aarch64": QEMU,
    "gcc": "exit 0",
    "mmdebstrap": "exit 0",
    "llvm-mca-19": "exit 0",
    "llvm-mc-19": "exit 0",
    "setarch": "exit 0",
    "tar": "exit 0",
}


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """`install(name=script)` puts programs on a PATH that has nothing else."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("os.geteuid", lambda: 1000)

    def install(**programs: str) -> None:
        for name, script in programs.items():
            path = tmp_path / name.replace("_", "-")
            path.write_text(f"#!/bin/sh\n{script}\n")
            path.chmod(0o755)

    return install


def commands(target: str) -> tuple[str, ...]:
    return examine(target).commands()


def problems(target: str) -> list[str]:
    return [need.problem for need in examine(target).needs if not need.is_met]


APT = "apt-get install -y --no-install-recommends"


@pytest.mark.parametrize(
    ("target", "command"),
    [
        ("cortex-a72", f"{APT} qemu-user llvm-19 gcc libc6-dev mmdebstrap util-linux tar"),
        ("docker:cortex-a72", f"{APT} docker.io llvm-19"),
        ("ssh://pi@board", f"{APT} openssh-client"),
        ("adb:0123", f"{APT} adb"),
    ],
)
def test_a_machine_with_nothing(install: Install, target: str, command: str) -> None:
    assert commands(target) == (command,)
    assert not examine(target).is_ready


def test_emulation(install: Install) -> None:
    install(**COMPLETE)
    readiness = examine("cortex-a72")
    assert (readiness.is_ready, readiness.commands()) == (True, ())
    assert any("version 7.2.19" in need.found for need in readiness.needs)
    install(qemu_aarch64="echo 'usage: no such option here'")
    assert "takes no plugins (a static build)" in problems("cortex-a72")[0]
    assert commands("cortex-a72") == (f"{APT} qemu-user qemu-user-static-",)  # the dash takes the static one away
    install(qemu_aarch64=QEMU, gcc="echo stdio.h: no such file >&2; exit 1")
    assert commands("cortex-a72") == (f"{APT} gcc libc6-dev",)


def test_emulation_elsewhere(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    assert problems("cortex-a72") == ["user-mode emulation runs on Linux only, this is Darwin"]
    assert "--target docker:cortex-a72" in commands("cortex-a72")[0]


DOCKER = {
    "echo 20.10 amd64": ("there is no image sepdeploy-arm64", "docker build -t sepdeploy-arm64 "),
    "echo 'Cannot connect to the Docker daemon at unix:///x. Is the docker daemon running?' >&2; exit 1": (
        "no Docker engine is running",
        "sudo s",
    ),
    "echo 'Got permission denied while trying to connect to the Docker daemon socket at x' >&2; exit 1": (
        "you may not use the Docker engine",
        "sudo usermod -aG docker ",
    ),
    "echo 'strange things' >&2; exit 1": ("docker says: strange things", ""),
}


@pytest.mark.parametrize("says", DOCKER)
def test_docker(install: Install, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(**COMPLETE)
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    install(docker=f'if [ "$1" = image ]; then echo "Error: No such image" >&2; exit 1; fi; {says}')
    problem, fix = DOCKER[says]
    assert problems("docker*") == [problem]
    assert [command[: len(fix)] for command in commands("docker*")] == ([fix] if fix else [])


def test_docker_with_everything(install: Install) -> None:
    install(docker="echo 20.10 amd64")
    assert examine("docker").is_ready
    assert commands("docker:cortex-a53") == (f"{APT} llvm-19",)
    install(**COMPLETE)
    assert examine("docker:cortex-a53").is_ready


def test_docker_that_hangs(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sepdeploy.bench.docker_engine._ANSWER_SECONDS", 0.2)
    install(docker="exec /bin/sleep 60")
    assert problems("docker") == ["asking the engine took more than 0.2 s and was stopped: docker does not answer"]


def test_adb(install: Install) -> None:
    install(adb="echo device")
    assert examine("adb").needs[-1].found == "device"
    assert examine("adb*").is_ready
    install(adb='echo "error: device unauthorized." >&2; exit 1')
    assert problems("adb:0123") == ["looking for it: error: device unauthorized."]
    assert commands("adb:0123") == ("allow this computer on the device's screen",)


@pytest.mark.parametrize(
    ("target", "installed", "problem", "fix"),
    [
        (
            "ssh://pi@board",
            {},
            "neither onnxruntime nor ai-edge-litert is installed there",
            "numpy onnxruntime ai-edge",
        ),
        (
            "ssh://pi@board",
            {".onnx": "onnxruntime 1.31"},
            "ssh://pi@board needs ai-edge-litert",
            "numpy ai-edge-litert",
        ),
        ("ssh://pi@board:ort", {".tflite": "ai-edge-litert 2.3"}, "board:ort needs onnxruntime", "numpy onnxruntime "),
        ("ssh://pi@board:ort", {".onnx": "onnxruntime 1.31"}, "", ""),
    ],
)
def test_the_runtime_of_a_board(
    install: Install, monkeypatch: pytest.MonkeyPatch, target: str, installed: dict[str, str], problem: str, fix: str
) -> None:
    reply = BoardReply((3, 11, 2), "aarch64", None, {"cpu": "Cortex-A72", "cores": 4}, (), (), installed)
    monkeypatch.setattr("sepdeploy.bench.board_ssh.run_on_board", lambda *given: reply)
    install(ssh="exit 0")
    *_, board, runtime = examine(target).needs
    assert board.found == "Cortex-A72, aarch64, Python 3.11.2"
    assert problem in runtime.problem
    assert fix in (runtime.fix or "")
    assert runtime.is_met == (not problem)


def test_local_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    assert examine("ort").is_ready
    kind = local_target._kind(
        "litert", "LiteRT", local_target.LITERT.format, ("numpy", "no_such_module"), "pip install x"
    )
    monkeypatch.setattr(local_target, "LITERT", kind)
    assert commands("litert") == ("pip install x",)
    assert [need.is_met for need in examine("litert").needs] == [True, False]


def test_every_target_is_known() -> None:
    for name in TARGETS_BY_NAME:
        assert examine(name).target == name
        assert examine(name).needs
    assert set(DEFAULT_TARGETS) <= set(DOCTORS)
    for name in ("nonsense", "ssh:/x", "", "cortex-z9", "docker:cortex-z9", "dockers", "adbx", "ssh://-x"):
        with pytest.raises(UsageError):
            examine(name)


def test_commands_are_said_once_and_packages_together() -> None:
    needs = (
        Need("a", problem="no a", packages=("p", "q")),
        Need("b", found="1", packages=("r",)),
        Need("c", problem="no c", fix="run c"),
        Need("d", problem="no d", packages=("q", "s")),
        Need("e", problem="no e", fix="run c"),
    )
    assert Readiness("x", "", needs).commands("sudo ") == (f"sudo {APT} p q s", "run c")


def test_exit_codes_follow_the_targets_that_are_named(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor"]) == 0  # emulation, Docker, ssh and adb are missing, but convert does not use them
    out = capsys.readouterr().out
    assert f"sudo {APT} qemu-user" in out
    assert out.endswith("ort, litert can be used\n")
    assert run(["doctor", "ort", "adb"]) == 4
    assert capsys.readouterr().out.endswith("ort, adb cannot all be used\n")
    assert run(["doctor", "nonsense"]) == 2


def test_exit_code_without_a_default_target(
    install: Install, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = local_target._kind("litert", "LiteRT", local_target.LITERT.format, ("no_such_module",), "pip install x")
    monkeypatch.setattr(local_target, "LITERT", kind)
    assert run(["doctor", "--json"]) == 4
    data = json.loads(capsys.readouterr().out)
    assert (data["ok"], data["judged_by"]) == (False, ["ort", "litert"])
    by_name = {target["target"]: target for target in data["targets"]}
    assert list(by_name) == list(DOCTORS)
    assert by_name["litert"]["commands"] == ["pip install x"]
    assert (by_name["ort"]["ready"], by_name["litert"]["ready"]) == (True, False)
    assert by_name["adb*"]["needs"] == [{"name": "adb", "met": False, "found": None, "problem": "adb is not installed"}]


def test_it_loads_no_heavy_package() -> None:
    code = (
        "import sys; from sepdeploy.cli.main import run; run(['doctor', 'ort', 'litert', 'cortex-a72', '--json']); "
        "assert not {'torch', 'onnxruntime', 'litert_torch', 'numpy'} & set(sys.modules), 'heavy'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
