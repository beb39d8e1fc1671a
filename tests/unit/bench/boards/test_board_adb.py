"""Android devices, with a program in the place of adb that records what it is told."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from sepdeploy.bench.board_adb import AdbDevice, _parsed, parse_adb
from sepdeploy.cli.main import run
from sepdeploy.errors import ToolError, UsageError

ADB = """#!{python}
import json, os, sys
words = sys.argv[1:]
with open({log!r}, "a") as log:
    log.write(json.dumps(words) + "\\n")
settings = json.load(open({settings!r}))
if words[:1] == ["-s"]:
    words = words[2:]
if words[0] == settings.get("fails_at") or words[1:2] == [settings.get("fails_at")]:
    sys.exit(settings["says"])
if words[0] == "shell" and words[1].endswith("benchmark_model"):
    number = 2 if "model-1" in " ".join(words) else 1
    print("count=1 curr=9999")  # the warm-up
    print(settings["statistics"] % (8000 // number, 9000 // number, 8400 // number, 8200 // number))
    if "count" in settings["statistics"]:
        print("INFO: Inference timings in us: Init: 1, First inference: 9, Warmup (avg): 9, Inference (avg): 8")
elif words[0] == "shell":
    print(settings["facts"].get(" ".join(words[1:]), ""))
"""
NEW = "count=25 first=9100 curr=8000 min=%d max=%d avg=%d std=100 p5=8000 median=%d p95=8900"
OLD = "count=25 first=9100 curr=8000 min=%d max=%d avg=%d std=100 "  # without what takes the fourth number
FACTS = {
    "getprop ro.soc.model": "SM8550",
    "getprop ro.product.model": "Pixel 8",
    "getprop ro.build.version.release": "14",
    "uname -m": "aarch64",
    "nproc": "8",
    "cat /sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "schedutil",
    "dumpsys thermalservice": "IsStatusOverride: false\nThermal Status: 2\n",
}


class Adb:
    def __init__(self, folder: Path) -> None:
        self.log, self.settings = folder / "log", folder / "settings"
        program = folder / "bin" / "adb"
        program.parent.mkdir()
        program.write_text(ADB.format(python=sys.executable, log=str(self.log), settings=str(self.settings)))
        program.chmod(0o755)
        self.folder = program.parent
        self.set()

    def set(self, **settings) -> None:
        self.settings.write_text(json.dumps({"statistics": NEW, "facts": FACTS, **settings}))

    @property
    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []


@pytest.fixture
def adb(tmp_path, monkeypatch):
    found = Adb(tmp_path)
    monkeypatch.setenv("PATH", str(found.folder))
    return found


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A program and two files, in the current folder."""
    folder = tmp_path / "files"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name in ("benchmark", "a.tflite", "b.tflite"):
        (folder / name).write_bytes(name.encode())
    return folder


def bench(*arguments: str) -> int:
    return run(["bench", *arguments, "--benchmark-model", "benchmark", "--seconds", "0.6", "--json"])


def test_two_files(adb, files, capsys):
    assert bench("a.tflite", "b.tflite", "--target", "adb:0123:55") == 0
    first, second = json.loads(capsys.readouterr().out).values()
    assert (first["median_ms"], first["minimum_ms"], first["repeats"]) == (8.2, 8.0, 150)
    assert (second["median_ms"], second["speedup"]) == (4.1, 2.0)
    assert first["method"] == "measured time on this machine or a board"
    environment = first["environment"]
    assert (environment["cpu"], environment["cores"], environment["system"]) == ("SM8550", 8, "Android 14 aarch64")
    assert environment["conditions"] == [
        "on adb:0123:55 (Pixel 8)",
        "governor schedutil",
        "THROTTLED: thermal status 2 of 6",
        "medians of six runs of the program",
    ]
    assert all(call[:2] == ["-s", "0123:55"] for call in adb.calls)
    timed = [call[3:] for call in adb.calls if call[3].endswith("benchmark_model") and call[2] == "shell"]
    graphs = [next(word for word in words if word.startswith("--graph="))[-8] for words in timed]
    assert graphs == list("011001100110")  # who is first changes from block to block
    assert all({"--num_threads=1", "--min_secs=0.100", "--warmup_runs=10"} <= set(words) for words in timed)
    folder = timed[0][0].rpartition("/")[0]
    assert folder.startswith("/data/local/tmp/sepdeploy-")
    assert adb.calls[-1][2:] == ["shell", "rm", "-rf", folder]


def test_old_programs_print_no_median(adb, files, capsys):
    adb.set(statistics=OLD + "%.0d")
    assert bench("a.tflite", "--target", "adb") == 0
    (found,) = json.loads(capsys.readouterr().out).values()
    assert found["median_ms"] == 8.4
    assert "averages of six runs of the program" in found["environment"]["conditions"]


def test_file_names_never_reach_a_shell(adb, files, capsys):
    name = "a;touch pwned $(touch pwned) -x.tflite"
    Path(name).write_bytes(b"x")
    assert bench(f"./{name}", "--target", "adb") == 0
    for call in adb.calls:
        if "shell" in call:
            assert "pwned" not in " ".join(call)
    (push,) = [call for call in adb.calls if name in call[1]]
    assert push[:2] == ["push", str(files / name)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fails_at": "mkdir", "says": "adb: no devices/emulators found"}, "allow USB debugging"),
        ({"fails_at": "mkdir", "says": "error: device unauthorized."}, "allow this computer on the device's screen"),
        ({"fails_at": "mkdir", "says": "error: more than one device/emulator"}, "name one as adb:SERIAL"),
        ({"fails_at": "push", "says": "adb: error: No space left on device"}, "free space in /data/local/tmp"),
        ({"statistics": "Segmentation fault %.0d%.0d%.0d%.0d"}, "benchmark_model printed no times: Segmentation fault"),
        ({"facts": {"getprop ro.kernel.qemu": "1", "getprop ro.hardware": "ranchu"}}, "is an emulator (ranchu)"),
    ],
)
def test_devices_that_cannot_be_used(adb, files, capsys, settings, message):
    adb.set(**settings)
    assert bench("a.tflite", "--target", "adb") == 4
    assert message in capsys.readouterr().err
    assert adb.calls[-1][:3] == ["shell", "rm", "-rf"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a.onnx", "--target", "adb"), "a.onnx is no .tflite file"),
        (("none.tflite", "--target", "adb"), "none.tflite does not exist"),
        (("a.tflite", "--target", "adb:-s"), "'adb:-s' is no device"),
        (("a.tflite", "--target", "adb:a;b"), "'adb:a;b' is no device"),
        (("a.tflite", "--target", "adb:"), "'adb:' is no device"),
    ],
)
def test_refusals(adb, files, capsys, arguments, message):
    Path("a.onnx").write_bytes(b"x")
    assert bench(*arguments) == 2
    assert message in capsys.readouterr().err
    assert adb.calls == []


def test_the_program_has_to_be_named(adb, files, capsys):
    assert run(["bench", "a.tflite", "--target", "adb"]) == 2
    assert "name it with --benchmark-model PATH" in capsys.readouterr().err


def test_without_adb(files, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    assert bench("a.tflite", "--target", "adb") == 4
    assert "adb is not installed; run apt-get install adb" in capsys.readouterr().err


def test_a_device_that_hangs(adb, files):
    (adb.folder / "adb").write_text("#!/bin/sh\nexec /bin/sleep 60\n")
    device = AdbDevice(None, Path("benchmark"))
    with pytest.raises(ToolError, match=r"took more than 0.1 s and was stopped"):
        device.run(["get-state"], "looking for it", 0.1)


def test_addresses():
    assert (parse_adb("adb"), parse_adb("adb:192.168.1.5:5555")) == (None, "192.168.1.5:5555")
    with pytest.raises(UsageError):
        parse_adb("adbx")


def test_a_single_run():
    assert _parsed("count=1 curr=1234 Inference (avg): 1234").middle_ms == 1.234
    with pytest.raises(ToolError, match="printed no times"):
        _parsed("")
