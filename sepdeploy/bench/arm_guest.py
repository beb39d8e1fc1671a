"""Runs files on an emulated Arm core, and reads what the counting plugin saw."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sepdeploy.bench.arm_cores import ArmCore
from sepdeploy.bench.arm_root import arm64_files, find_plugin, find_root
from sepdeploy.bench.outside_programs import last_line
from sepdeploy.core.progress import Progress
from sepdeploy.errors import ToolError

__all__ = [
    "GUEST",
    "INCOMPLETE",
    "Block",
    "GuestFile",
    "GuestPlace",
    "Launched",
    "Region",
    "guest_arguments",
    "guest_environment",
    "parse_counts",
    "run_guest",
]

_STILL_SECONDS = 900.0
"""A guest that finishes no file for so long hangs: an inference of 10 billion instructions takes about two minutes."""

_POLL_SECONDS = 0.05
_TIMED_OUT = 124

GUEST = "the guest"
"""How the error begins of a file that ended the process."""

INCOMPLETE = "its counts are incomplete"

Launched = tuple[Sequence[str], dict[str, str] | None]
"""A command and its environment; None is that of this process."""


@dataclass(frozen=True, slots=True)
class Block:
    """A stretch of instructions that is executed from its first to its last.

    Attributes:
        words: The instructions in hexadecimal, 8 digits each.
        classes: Class of instruction -> how many of them.
        macs: Multiply-accumulates of all lanes.
        loaded_bytes: Bytes that it loads.
        stored_bytes: Bytes that it stores.
    """

    words: str
    classes: dict[str, int]
    macs: int
    loaded_bytes: int
    stored_bytes: int

    @property
    def length(self) -> int:
        """Instructions."""
        return len(self.words) // 8


@dataclass(frozen=True, slots=True)
class Region:
    """What one inference, or a burst of them, executed on the thread that ran it.

    Attributes:
        blocks: Number of a block in the run -> how often.
        l1_misses: Misses of the first data cache.
        l2_misses: Of these, misses of the second.
        elsewhere: Instructions that other threads executed meanwhile.
    """

    blocks: dict[int, int]
    l1_misses: int
    l2_misses: int
    elsewhere: int = 0

    def without(self, nothing: Region) -> Region:
        """The same without what marking a region costs."""
        left = {number: count - nothing.blocks.get(number, 0) for number, count in self.blocks.items()}
        return Region(
            {number: count for number, count in left.items() if count > 0},
            max(0, self.l1_misses - nothing.l1_misses),
            max(0, self.l2_misses - nothing.l2_misses),
            self.elsewhere,
        )


@dataclass(frozen=True, slots=True)
class GuestFile:
    """How one file went.

    Attributes:
        path: The file.
        runtime: Name and version of the runtime in the guest; empty if it did not come that far.
        error: Why there are no counts; empty if there are.
        repeats: One region for each burst of inferences that counts.
        blocks: What the regions' numbers mean.
        burst: Inferences in each region.
    """

    path: Path
    runtime: str
    error: str
    repeats: tuple[Region, ...] = ()
    blocks: tuple[Block, ...] = field(default=(), repr=False)
    burst: int = 1


@dataclass(frozen=True, slots=True)
class GuestPlace:
    """An emulator somewhere else than on this machine.

    Attributes:
        name: What it is, for the record.
        launch: From the file for counts, options of bench.py and files to the command that runs them; when the block
            ends, nothing of it must be left.
        limit_seconds: After how long the command ends by itself, with the exit code of `timeout`.
    """

    name: str
    launch: Callable[[Path, Sequence[str], Sequence[Path]], AbstractContextManager[Launched]]
    limit_seconds: float | None = None


def run_guest(
    core: ArmCore,
    paths: Sequence[Path],
    progress: Progress,
    *,
    repeats: int = 3,
    warmup: int = 2,
    seed: int = 0,
    bursts: Sequence[int] | None = None,
    outputs: Path | None = None,
    still_seconds: float = _STILL_SECONDS,
    place: GuestPlace | None = None,
) -> list[GuestFile]:
    """Run files one after the other in one emulated process, counting each inference.

    Where a file crashes the process, or it stands still, the rest runs in a new one.

    Args:
        core: Where.
        paths: ONNX and TFLite files.
        progress: Told what is going on.
        repeats: Inferences, or bursts of them, that count.
        warmup: Inferences before them.
        seed: Of the random inputs.
        bursts: Inferences in a row that make one that counts, for each file; None for 1.
        outputs: Folder for 0.npz, 1.npz, ... of the outputs (docker/arm64/bench.py).
        still_seconds: Most time for one file.
        place: The emulator; None is that of this machine.

    Returns:
        One result for each file, in order; what is wrong with a file is in its `error`.

    Raises:
        ToolError: if the emulator, the root or the plugin does not work.
    """
    place = place or _emulator_here(core, progress)
    results: list[GuestFile] = []
    while len(results) < len(paths):  # more than once where a file ends the process
        first = len(results)
        numbers = {"--repeats": repeats, "--warmup": warmup, "--seed": seed, "--first": first}
        options = ["--marks", *(text for name, value in numbers.items() for text in (name, str(value)))]
        options += ["--bursts", ",".join(map(str, bursts[first:]))] if bursts else []
        options += ["--outputs", str(outputs.resolve())] if outputs is not None else []
        try:
            results += _run_once(place, options, paths, first, progress, still_seconds)
        except OSError as error:
            raise ToolError(
                f"cannot write to {tempfile.gettempdir()}: {error.strerror or error}; free space there or set TMPDIR"
            ) from error
    return results


def guest_arguments(core: ArmCore, root: Path, plugin: Path, counts: Path, arguments: Sequence[str]) -> list[str]:
    """The command line that runs docker/arm64/bench.py on a core and counts.

    Args:
        core: Where.
        root: The core's view of an arm64 root.
        plugin: The counting plugin.
        counts: File that it writes.
        arguments: Of bench.py.
    """
    caches = ",".join(f"{name}={each.kib}:{each.ways}" for name, each in (("l1", core.l1), ("l2", core.l2)))
    plugin_text, counts_text = (str(path).replace(",", ",,") for path in (plugin, counts))  # a comma, as QEMU reads it
    return [
        *("qemu-aarch64", "-seed", "1", "-cpu", core.qemu_cpu, "-L", str(root)),
        *("-plugin", f"{plugin_text},out={counts_text},{caches}"),
        *(str(root / "usr" / "bin" / "python3.11"), "-s", "-S", "-B", str(arm64_files() / "bench.py"), *arguments),
    ]


def guest_environment(root: Path) -> dict[str, str]:
    """All that programs in the guest see of an environment: counts depend on it."""
    return {
        "PATH": "/usr/bin:/bin",
        "HOME": "/",
        "LANG": "C.UTF-8",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "ORT_DISABLE_TELEMETRY": "1",
        "PYTHONHASHSEED": "0",
        "PYTHONPATH": str(root / "opt" / "site"),
    }


def parse_counts(text: str) -> tuple[tuple[Block, ...], tuple[Region, ...], bool]:
    """What the plugin wrote: blocks, regions, and whether the program came to its end.

    Raises:
        ToolError: if the text is no such thing, as when the disk was full.
    """
    blocks: list[Block] = []
    regions: list[Region] = []
    has_ended = False
    try:
        for line in text.splitlines():
            data: dict[str, Any] = json.loads(line)
            if "block" in data:
                blocks.append(
                    Block(data["words"], data["classes"], data["macs"], data["loaded_bytes"], data["stored_bytes"])
                )
            elif "region" in data:
                misses = (data.get("l1_misses", 0), data.get("l2_misses", 0))
                regions.append(Region(dict(data["blocks"]), *misses, data.get("elsewhere", 0)))
            else:
                has_ended = bool(data["end"])
    except (ValueError, KeyError, TypeError) as error:
        if has_ended:
            raise ToolError(f"the counts of the emulator are damaged: {error}") from error
        # The last line of a program that was killed, or of a full disk.
    return tuple(blocks), tuple(regions), has_ended


def _emulator_here(core: ArmCore, progress: Progress) -> GuestPlace:
    """The emulator of this machine, with the plugin and the root that are made on first use."""
    root, plugin = find_root(progress) / core.name, find_plugin()
    if not (root / "proc" / "cpuinfo").is_file():
        raise ToolError(
            f"{root} has no proc/cpuinfo, without which runtimes crash: remove {root.parent}, and it is built anew"
        )

    @contextmanager
    def launch(counts: Path, options: Sequence[str], paths: Sequence[Path]) -> Iterator[Launched]:
        arguments = [*options, *(str(path.resolve()) for path in paths)]
        command = guest_arguments(core, root, plugin, counts, arguments)
        if _may_change_personality():
            command = ["setarch", "-R", *command]
        yield command, guest_environment(root)

    return GuestPlace("qemu-aarch64", launch)


def _run_once(
    place: GuestPlace,
    options: Sequence[str],
    paths: Sequence[Path],
    first: int,
    progress: Progress,
    still_seconds: float,
) -> list[GuestFile]:
    """Results of the files from the first on, up to one that ends the process."""
    with tempfile.TemporaryDirectory(prefix="sepdeploy-arm-") as folder:
        counts, printed, said = (Path(folder) / name for name in ("counts.jsonl", "printed.jsonl", "stderr.txt"))
        with place.launch(counts, options, paths[first:]) as (command, environment):
            code = _run_watched(command, environment, printed, said, still_seconds, len(paths), first, progress)
        if code == _TIMED_OUT and place.limit_seconds is not None:
            code, still_seconds = None, place.limit_seconds
        reports = [json.loads(line) for line in printed.read_text().splitlines() if line.endswith("}")]
        stderr = said.read_text(errors="replace")
        has_started = counts.is_file()  # the plugin makes it before anything runs
        text = counts.read_text() if has_started else ""
    has_finished = bool(reports) and "end" in reports[-1]
    reports = [report for report in reports if "file" in report]
    blocks, regions, is_whole = parse_counts(text)
    if has_finished and code == 0 and not is_whole:
        raise ToolError(
            f"the counts of the emulator are incomplete; is the disk of {tempfile.gettempdir()} full?", stderr=stderr
        )
    if not has_started:
        why = last_line(stderr) if stderr.strip() else _ending(code)
        raise ToolError(
            f"qemu-aarch64 does not start with the counting plugin: {why}; it takes "
            "the dynamic qemu-user of Debian 12 (7.2), static builds take no plugins",
            stderr=stderr,
        )
    results = []
    for path, report in zip(paths[first:], reports, strict=False):
        own, regions = regions[: report["regions"]], regions[report["regions"] :]
        error = report.get("error", "")
        if not error and len(own) < report["regions"]:
            error = INCOMPLETE
        nothing = 2 * report["warmup"]  # the region around nothing right before those that count
        repeats = tuple(region.without(own[nothing]) for region in own[nothing + 1 :])
        results.append(GuestFile(path, report.get("runtime", ""), error, repeats, blocks, report["burst"]))
    if not has_finished and first + len(results) < len(paths):
        at_fault = paths[first + len(results)]
        last_words = f" ({last_line(stderr)})" if stderr.strip() and code == 1 else ""
        results.append(
            GuestFile(at_fault, "", f"{GUEST} {_ending(code, still_seconds)}{last_words} while it ran {at_fault.name}")
        )
    return results


def _run_watched(
    command: Sequence[str],
    environment: dict[str, str] | None,
    printed: Path,
    said: Path,
    still_seconds: float,
    total: int,
    first: int,
    progress: Progress,
) -> int | None:
    """Exit code of a program; None if it was killed because it printed nothing for `still_seconds`."""
    with printed.open("wb") as stdout, said.open("wb") as stderr:
        try:
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, start_new_session=True
            )
        except OSError as error:
            raise ToolError(f"{command[0]} cannot be started: {error.strerror}") from error
        try:
            size, since = -1, time.monotonic()
            while process.poll() is None:
                if printed.stat().st_size != size:
                    size, since = printed.stat().st_size, time.monotonic()
                    progress.step(first + printed.read_bytes().count(b"\n"), total)
                if time.monotonic() - since > still_seconds:
                    return None
                time.sleep(_POLL_SECONDS)
            return process.returncode
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _may_change_personality() -> bool:
    """Whether `setarch -R` works; containers mostly forbid it."""
    return subprocess.run(["setarch", "-R", "true"], capture_output=True, check=False).returncode == 0


def _ending(code: int | None, still_seconds: float = 0.0) -> str:
    """How a program ended, as a verb phrase."""
    if code is None:
        return f"was stopped after {still_seconds:g} s without a result"
    number = -code if code < 0 else code - 128
    if code < 0 or code > 128:
        try:
            return f"crashed ({signal.Signals(number).name})"
        except ValueError:
            pass
    return f"ended with exit code {code}"
