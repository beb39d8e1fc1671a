"""The arm64 image, built and run by a real engine."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from sepdeploy.bench.arm_cores import ARM_CORES, find_core
from sepdeploy.bench.arm_counts import count_files, require_counts
from sepdeploy.bench.arm_root import arm64_files
from sepdeploy.bench.docker_container import named_container
from sepdeploy.bench.docker_engine import docker, docker_needs
from sepdeploy.bench.docker_guest import core_of_target, count_in_docker, time_in_docker
from sepdeploy.cli import main
from sepdeploy.core.progress import Silent
from sepdeploy.errors import ToolError, UsageError
from sepdeploy.export.onnx import export_onnx

CORE = find_core("cortex-a72")
LIMIT = 120.0


def in_docker(paths, image, limit=LIMIT):
    return count_in_docker(CORE, paths, Silent(), image=image, limit_seconds=limit)


@pytest.mark.parametrize("runtime", ["litert", "ort"])
def test_both_ways_count_the_same(runtime, image, engine, tflite_file, tmp_path):
    path = tmp_path / 'a,b "c"; $(touch pwned)\n'
    if runtime == "litert":
        path = path.with_suffix(".tflite")
        path.write_bytes(tflite_file.read_bytes())
    else:  # onnxruntime looks names up in tables whose order is not the same everywhere: hundreds of instructions
        path = path.with_suffix(".onnx")
        export_onnx(torch.nn.Conv2d(32, 64, 3).eval(), torch.zeros(1, 32, 32, 32), path)
    path.chmod(0o600)  # nobody could not read it
    (here,) = require_counts([path], count_files(CORE, [path], Silent()))
    (there,) = in_docker([path], image)
    assert there.instructions == pytest.approx(here.instructions, rel=1e-3)
    assert there.macs == here.macs > 0
    assert sum(there.classes.values()) == there.instructions
    for name, count in here.classes.items():
        assert there.classes.get(name, 0) == pytest.approx(count, rel=1e-3, abs=1e-3 * here.instructions)
    assert there.kcycles_low == pytest.approx(here.kcycles_low, rel=5e-3)
    assert there.artifact_sha256 == here.artifact_sha256
    assert there.environment.cpu == "Cortex-A72 emulated by the qemu-aarch64 of the Docker image sepdeploy-arm64"
    assert there.environment.runtime == here.environment.runtime
    assert engine.containers() == []


def test_outputs_are_compared_with_this_machine(image, engine, tflite_file, int8_onnx_file, capsys):
    files = [str(tflite_file), str(int8_onnx_file)]
    assert main.run(["bench", *files, "--target", "docker:cortex-a76", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    units = [data[file]["numerics"]["is_in_steps"] for file in files]
    differences = [data[file]["numerics"]["difference"] for file in files]
    assert units[0] is False
    assert differences[0] < 1e-5
    assert differences[1] <= 1.0
    assert engine.containers() == []


def test_the_image_alone(image, tflite_file, tmp_path):
    """As its Dockerfile says: a folder is mounted, and what one inference executes is printed."""
    models = tmp_path / "models"
    models.mkdir()
    (models / "net.tflite").write_bytes(tflite_file.read_bytes())
    (models / "bad.tflite").write_bytes(b"no network")
    for path in (models, *models.iterdir()):
        path.chmod(0o755)
    words = ["run", "--rm", "--init", "--network=none", f"--volume={models}:/models:ro", image]
    done = docker(
        [*words, "cortex-a76", "/models/net.tflite", "/models/bad.tflite"], purpose="test", limit_seconds=LIMIT
    )
    assert done.code == 0, done.errors
    good, bad = (json.loads(line) for line in done.output.splitlines())
    assert sum(good["classes"].values()) == good["instructions"] > 0
    assert (good["core"], good["method"], good["repeats"]) == ("cortex-a76", "instructions counted under emulation", 3)
    assert "error" in bad
    assert not [key for key in (*good, *bad) if key.endswith(("_ms", "_ns"))]  # emulated time is none
    usage = docker(["run", "--rm", "--network=none", image, "cortex-z9", "x"], purpose="test")
    assert usage.code == 2
    assert "CORE is cortex-a53" in usage.errors


def test_how_it_is_confined(image, engine, tmp_path):
    script = "id -u; cat /proc/net/dev | wc -l; touch /x 2>&1; touch /models/x 2>&1; echo y >/tmp/x && cat /tmp/x"
    with named_container(image) as container:
        command = container.command(("-c", script), mounts={tmp_path: "/models"}, entry="/bin/sh")
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    user, devices, root, models, scratch = done.stdout.splitlines()
    assert (user, devices, scratch) == ("65534", "3", "y")  # two lines of titles and the loopback
    assert "Read-only file system" in root
    assert "Read-only file system" in models or "Permission denied" in models
    assert engine.containers() == []


def test_the_entry_point_knows_the_same_cores():
    lines = re.findall(r"^(cortex-\S+)\) cpu=(\S+) caches=(\S+) ;;$", (arm64_files() / "entry.sh").read_text(), re.M)
    assert {name: (cpu, caches) for name, cpu, caches in lines} == {
        core.name: (core.qemu_cpu, f"l1={core.l1.kib}:{core.l1.ways},l2={core.l2.kib}:{core.l2.ways}")
        for core in ARM_CORES.values()
    }


def test_an_engine_that_is_no_arm_machine(image, engine, onnx_file):
    with pytest.raises(ToolError, match="no Arm machine and does not run Arm programs; use an Arm host"):
        time_in_docker([onnx_file], image=image, threads=1, seconds=0.01, seed=0, limit_seconds=LIMIT)
    assert engine.containers() == []


def derived(image, tag, *lines):
    """An image that differs from ours."""
    text = "\n".join((f"FROM {image}", "USER 0:0", *lines, "USER 65534:65534"))
    command = ["docker", "build", "--quiet", "--network=none", "--tag", tag, "-"]
    built = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return tag


def test_an_emulated_container_gives_no_times(image, engine, onnx_file):
    """As where the kernel hands Arm programs to an emulator: here a script does."""
    view = "/arm64/cortex-a72"
    script = (
        f'exec env PYTHONPATH={view}/opt/site qemu-aarch64 -cpu cortex-a72 -L {view} {view}/usr/bin/python3.11 "$@"'
    )
    tag = derived(image, "emulated", f"RUN printf '#!/bin/sh\\n%s\\n' '{script}' > /arm64/programs/python.sh")
    with pytest.raises(
        ToolError, match=r"docker runs under emulation \(qemu-aarch64 on x86\): times from there say nothing"
    ):
        time_in_docker([onnx_file], image=tag, threads=1, seconds=0.01, seed=0, limit_seconds=LIMIT)
    assert engine.containers() == []


def test_a_root_without_cpuinfo(image, engine, onnx_file):
    tag = derived(image, "no-cpuinfo", "RUN rm /arm64/cortex-a72/proc/cpuinfo")
    sentence = r"^no-cpuinfo: the image has no /arm64/cortex-a72/proc/cpuinfo, without which runtimes crash: build it"
    with pytest.raises(ToolError, match=sentence):
        in_docker([onnx_file], tag)


def test_a_guest_that_crashes_and_one_that_hangs(image, engine, onnx_file):
    crash = derived(image, "crash", "RUN printf 'import os\\nos.kill(os.getpid(), 11)\\n' > /arm64/programs/bench.py")
    with pytest.raises(ToolError, match=r"net.onnx cannot be counted: the guest crashed \(SIGSEGV\)"):
        in_docker([onnx_file], crash)
    hang = derived(image, "hang", "RUN printf 'import time\\ntime.sleep(300)\\n' > /arm64/programs/bench.py")
    with pytest.raises(ToolError, match=r"net.onnx cannot be counted: the guest was stopped after 3 s"):
        in_docker([onnx_file], hang, limit=3)
    assert engine.containers() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_leaves_nothing(number, image, engine, onnx_file):
    tag = derived(image, "hang", "RUN printf 'import time\\ntime.sleep(300)\\n' > /arm64/programs/bench.py")
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # background jobs ignore it
        "from sepdeploy.cli.main import main\n"
        f"main(['bench', {str(onnx_file)!r}, '--target', 'docker:cortex-a72', '--image', {tag!r}])"
    )
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 30
        while not engine.containers():
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < end
            time.sleep(0.05)
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
    assert "Traceback" not in errors
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert engine.containers() == []


def test_images_that_are_missing(engine, onnx_file):
    with pytest.raises(
        ToolError, match=r"there is no image no-such-image: run docker build -t no-such-image .*docker/arm64"
    ):
        in_docker([onnx_file], "no-such-image")


def test_doctor(image):
    assert [need.is_met for need in docker_needs(image)] == [True, True, True]


def test_a_socket_that_one_may_not_use(engine, tmp_path, monkeypatch):
    """The client as nobody: permissions do not bind root."""
    client = tmp_path / "docker"
    client.write_text('#!/bin/sh\nexec setpriv --reuid=65534 --regid=65534 --clear-groups /usr/bin/docker "$@"\n')
    client.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", "/nonexistent")
    engine.socket.chmod(0o600)
    problem = docker_needs()[-1]
    assert problem.problem == f"you may not use the Docker engine at {engine.host}"
    assert problem.fix.startswith("sudo usermod -aG docker ")


def test_engines_that_do_not_run(onnx_file, monkeypatch, tmp_path):
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none")
    with pytest.raises(ToolError, match=r"no Docker engine is running at unix:.*: run sudo s"):
        in_docker([onnx_file], "sepdeploy-arm64")


@pytest.mark.parametrize("target", ["docker:", "docker:cortex-z9", "dockers", "docker:-v/:/x"])
def test_targets_that_do_not_exist(target):
    with pytest.raises(UsageError):
        core_of_target(target)


def test_targets():
    assert core_of_target("docker") is None
    assert core_of_target("docker:cortex-a55") is ARM_CORES["cortex-a55"]
