"""Android devices that adb reaches: LiteRT's own `benchmark_model` is timed there, for there is no Python.

Each of six blocks runs the program once for each file, in an order that changes from block to block, so that files are
loaded anew and the device's pace hits all of them; a block counts as one measurement.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from sepdeploy.bench.outside_programs import Finished, find_program, last_line, run_program
from sepdeploy.bench.timing import balanced_orders, median_interval
from sepdeploy.core.files import sha256_of_file
from sepdeploy.core.measurement import Environment, Latency, Method
from sepdeploy.core.readiness import Need
from sepdeploy.errors import ToolError, UsageError

__all__ = ["AdbDevice", "adb_needs", "parse_adb", "time_files_on_device"]

_ADDRESS = re.compile(r"adb(?::(?P<serial>[A-Za-z0-9][A-Za-z0-9._:-]*))?")
_BLOCKS = 6
_WARMUP = 10
_MIN_RUNS = 4
_ANSWER_SECONDS = 60.0
_STARTUP_SECONDS = 30.0

# Statistics of benchmark_model, in microseconds; older builds print no median.
_COUNTED = re.compile(
    r"count=(\d+)[^\n]*?\bmin=(\d+)[^\n]*?\bmax=\d+[^\n]*?\bavg=([0-9.e+]+)(?:[^\n]*?\bmedian=(\d+))?"
)
_SUM = "Inference (avg)"
_LONE = re.compile(r"count=1 curr=(\d+)")


@dataclass(frozen=True, slots=True)
class AdbDevice:
    """An Android device.

    Attributes:
        serial: As `adb devices` lists it; None is the only one that is connected.
        benchmark_model: LiteRT's program of that name for the device, on this machine.
        limit_seconds: How long one run of it may take.
    """

    serial: str | None
    benchmark_model: Path
    limit_seconds: float = 600.0

    @property
    def name(self) -> str:
        """As on the command line."""
        return f"adb:{self.serial}" if self.serial else "adb"

    def run(self, arguments: Sequence[str], purpose: str, limit_seconds: float = _ANSWER_SECONDS) -> Finished:
        """Run one adb command.

        Args:
            arguments: What comes after the choice of the device. What follows 'shell' is read by a shell there, so it
                must not hold anything that a user named.
            purpose: For messages.
            limit_seconds: How long it may take.

        Raises:
            ToolError: if it fails.
        """
        path = find_program("adb")
        if path is None:
            raise ToolError("adb is not installed; run apt-get install adb")
        device = ["-s", self.serial] if self.serial else []
        done = run_program([path, *device, *arguments], limit_seconds=limit_seconds, purpose=f"{self.name}: {purpose}")
        if done.code:
            raise self._error(done, purpose)
        return done

    def _error(self, done: Finished, purpose: str) -> ToolError:
        text = done.errors + done.output
        advice = ""
        if "no devices" in text or ("not found" in text and "device" in text):
            advice = "; connect it, allow USB debugging, and see whether adb devices lists it"
        elif "unauthorized" in text:
            advice = "; allow this computer on the device's screen"
        elif "more than one" in text:
            advice = "; name one as adb:SERIAL, as adb devices lists them"
        elif "No space left" in text:
            advice = "; free space in /data/local/tmp there"
        return ToolError(f"{self.name}: {purpose}: {last_line(text)}{advice}", stderr=text)


def parse_adb(target: str) -> str | None:
    """The serial number in 'adb' or 'adb:SERIAL'.

    Raises:
        UsageError: if it is neither.

    >>> parse_adb("adb:emulator-5554")
    'emulator-5554'
    """
    found = _ADDRESS.fullmatch(target)
    if found is None:
        raise UsageError(f"{target!r} is no device: give adb, or adb:SERIAL as adb devices lists it")
    return found["serial"]


def time_files_on_device(device: AdbDevice, paths: Sequence[Path], *, threads: int, seconds: float) -> list[Latency]:
    """Latency of each TFLite file; the first is what speed-ups are relative to.

    `Latency.median_ms`, `p10_ms` and `p90_ms` are of the six blocks' medians (averages, where the program prints no
    medians), `minimum_ms` is of all runs.

    Raises:
        UsageError: if a file is none that the program runs.
        ToolError: if adb or the program fails.
    """
    for path in (device.benchmark_model, *paths):
        if not path.is_file():
            raise UsageError(f"{path} does not exist or is not a file")
    for path in paths:
        if path.suffix.lower() != ".tflite":
            raise UsageError(f"{path} is no .tflite file, and benchmark_model runs only those")
    name = f"sepdeploy-{secrets.token_hex(8)}"
    folder = f"/data/local/tmp/{name}"
    try:
        device.run(["shell", "mkdir", "-m", "700", folder], "making a folder")
        for sent, path in {"benchmark_model": device.benchmark_model, **_names(paths)}.items():
            device.run(["push", str(path.resolve()), f"{folder}/{sent}"], f"sending {path.name}", device.limit_seconds)
        device.run(["shell", "chmod", "700", f"{folder}/benchmark_model"], "making the program executable")
        emulated = _emulated(device)
        if emulated:
            raise ToolError(
                f"{device.name} is an emulator ({emulated}): times from there say nothing about any phone; use a real "
                "device"
            )
        blocks = _blocks(device, folder, len(paths), threads, seconds)
        environment = _environment(device, threads, blocks)
    finally:
        # At the limit and on Ctrl-C the client alone dies: what it started goes on, and is known by its folder. The
        # brackets keep the pattern from matching the shell that pkill is run by.
        with suppress(ToolError):
            device.run(["shell", "pkill", "-f", f"{name[:-1]}[{name[-1]}]"], "ending what runs there")
        with suppress(ToolError):  # it may be gone; what went wrong before is what matters
            device.run(["shell", "rm", "-rf", folder], "cleaning up")
    return [_latency(path, place, blocks, environment) for place, path in enumerate(paths)]


@dataclass(frozen=True, slots=True)
class _Block:
    """Statistics of one run of the program."""

    runs: int
    middle_ms: float
    minimum_ms: float
    is_median: bool


def _names(paths: Sequence[Path]) -> dict[str, Path]:
    return {_model(place): path for place, path in enumerate(paths)}


def _model(place: int) -> str:
    return f"model-{place}.tflite"


def _blocks(device: AdbDevice, folder: str, count: int, threads: int, seconds: float) -> list[list[_Block]]:
    """Statistics by block and file."""
    orders = balanced_orders(count)
    blocks = []
    for number in range(_BLOCKS):
        block: dict[int, _Block] = {}
        for place in orders[number % len(orders)]:
            command = [
                f"{folder}/benchmark_model",
                f"--graph={folder}/{_model(place)}",
                f"--num_threads={threads:d}",
                f"--warmup_runs={_WARMUP:d}",
                "--warmup_min_secs=0",
                f"--num_runs={_MIN_RUNS:d}",
                f"--min_secs={seconds / _BLOCKS:.3f}",
                "--use_xnnpack=true",
            ]
            limit = _STARTUP_SECONDS + device.limit_seconds
            done = device.run(["shell", *command], "running benchmark_model", limit)
            block[place] = _parsed(done.output + done.errors)
        blocks.append([block[place] for place in range(count)])
    return blocks


def _parsed(text: str) -> _Block:
    """The last statistics before the program sums up: those before are of the warm-up.

    >>> _parsed("count=50 first=9 curr=8 min=7 max=12 avg=8.5 std=1 p5=7 median=8 p95=11, Inference (avg): 8").middle_ms
    0.008
    """
    text, is_complete, _ = text.partition(_SUM)
    found = list(_COUNTED.finditer(text)) if is_complete else []
    if found:
        runs, minimum, average, middle = found[-1].groups()
        value = float(middle) if middle else float(average)
        return _Block(int(runs), value / 1e3, int(minimum) / 1e3, middle is not None)
    alone = list(_LONE.finditer(text)) if is_complete else []
    if alone:
        return _Block(1, int(alone[-1][1]) / 1e3, int(alone[-1][1]) / 1e3, is_median=True)
    raise ToolError(
        f"benchmark_model printed no times: {last_line(text)}; is it built for this device, and does it run the file?",
        stderr=text,
    )


def _latency(path: Path, place: int, blocks: Sequence[Sequence[_Block]], environment: Environment) -> Latency:
    import numpy as np

    own = [block[place] for block in blocks]
    times_ms = [each.middle_ms for each in own]
    speedup = low = high = None
    if place > 0:
        ratios = [block[0].middle_ms / max(block[place].middle_ms, 1e-6) for block in blocks]
        speedup = median(ratios)
        low, high = median_interval(ratios)
    p10, p90 = np.percentile(times_ms, (10, 90))
    return Latency(
        median_ms=median(times_ms),
        minimum_ms=min(each.minimum_ms for each in own),
        p10_ms=float(p10),
        p90_ms=float(p90),
        repeats=sum(each.runs for each in own),
        warmup=_WARMUP,
        method=Method.WALL_CLOCK,
        environment=environment,
        artifact_sha256=sha256_of_file(path),
        speedup=speedup,
        speedup_low=low,
        speedup_high=high,
    )


def _emulated(device: AdbDevice) -> str:
    """What an emulator calls its hardware; empty on a real device.

    Raises:
        ToolError: if the device does not say.
    """
    hardware = device.run(["shell", "getprop", "ro.hardware"], "asking what it is").output.strip()
    is_emulator = _said(device, "getprop", "ro.kernel.qemu") == "1" or _said(device, "getprop", "ro.boot.qemu") == "1"
    return (
        hardware or "qemu" if is_emulator or hardware in {"goldfish", "ranchu"} or hardware.startswith("cutf") else ""
    )


def _environment(device: AdbDevice, threads: int, blocks: Sequence[Sequence[_Block]]) -> Environment:
    """What the device says of itself after the measurement."""
    cpu = _said(device, "getprop", "ro.soc.model") or _said(device, "getprop", "ro.board.platform") or "unknown"
    cores = _said(device, "nproc")
    governor = _said(device, "cat", "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    statistic = "medians" if all(each.is_median for block in blocks for each in block) else "averages"
    thermal = re.search(r"Thermal Status: (\d+)", _said(device, "dumpsys", "thermalservice"))
    return Environment(
        cpu=cpu,
        cores=int(cores) if cores.isdigit() else 1,
        system=f"Android {_said(device, 'getprop', 'ro.build.version.release')} {_said(device, 'uname', '-m')}".strip(),
        runtime="LiteRT benchmark_model",
        threads=threads,
        conditions=(
            f"on {device.name} ({_said(device, 'getprop', 'ro.product.model') or 'unknown model'})",
            f"governor {governor}" if governor else "governor unknown",
            _thermal(thermal),
            f"{statistic} of six runs of the program",
        ),
    )


def _thermal(found: re.Match[str] | None) -> str:
    if found is None:
        return "throttling unknown"
    return "not throttled" if found[1] == "0" else f"THROTTLED: thermal status {found[1]} of 6"


def _said(device: AdbDevice, *command: str) -> str:
    try:
        return device.run(["shell", *command], "asking what it is").output.strip()
    except ToolError:  # older systems know fewer of them
        return ""


def adb_needs(target: str) -> tuple[Need, ...]:
    """The client and, where a device is named, that it answers; benchmark_model is the user's."""
    serial = None if target == "adb*" else parse_adb(target)
    client = find_program("adb")
    if client is None:
        return (Need("adb", problem="adb is not installed", packages=("adb",)),)
    found = Need("adb", found=client)
    if target == "adb*":
        return (found,)
    device = AdbDevice(serial, Path())
    try:
        state = device.run(["get-state"], "looking for it").output.strip()
    except ToolError as error:
        problem, _, fix = str(error).removeprefix(f"{device.name}: ").partition("; ")
        return found, Need("the device", problem=problem, fix=fix or "adb devices")
    return found, Need("the device", found=state)
