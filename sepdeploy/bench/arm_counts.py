"""Counts what files execute on an emulated Arm core."""

from __future__ import annotations

import builtins
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from sepdeploy.bench.arm_cores import ArmCore
from sepdeploy.bench.arm_cycles import CycleModel
from sepdeploy.bench.arm_guest import GUEST, INCOMPLETE, GuestFile, GuestPlace, Region, run_guest
from sepdeploy.bench.arm_root import require_tools, tool_versions
from sepdeploy.core.files import sha256_of_file
from sepdeploy.core.measurement import Counts, Environment, Method
from sepdeploy.core.passing_errors import sounds_passing
from sepdeploy.core.progress import Progress
from sepdeploy.errors import ToolError

__all__ = ["compare_counts", "count_files", "counts_of", "is_refused", "require_counts"]

_SPREAD_RATIO = 0.005
"""Repeats whose instructions differ by more are no counts."""

_ELSEWHERE_RATIO = 0.05
"""Where other threads execute so much of it in every repeat, they run the network too, uncounted."""

_BURST_INSTRUCTIONS = 1_000_000
_LEAST_BURST, _MOST_BURST = 4, 64
"""What the allocator varies by, up to some thousand instructions, vanishes in bursts of so many."""

_NOT_COUNTED = "it was not counted"
_UNSTEADY = "its repeats differ by"


def count_files(
    core: ArmCore,
    paths: Sequence[Path],
    progress: Progress,
    *,
    seed: int = 0,
    repeats: int = 3,
    warmup: int = 2,
    place: GuestPlace | None = None,
) -> list[Counts | str]:
    """What one inference of each file executes.

    Args:
        core: Where.
        paths: ONNX and TFLite files; all run in one emulated process.
        progress: Told what is going on.
        seed: Of the random inputs.
        repeats: Inferences that count, at least 2; all have to agree.
        warmup: Inferences before them.
        place: The emulator; None is that of this machine.

    Returns:
        One result for each file, in order, or a sentence that says why there is none.

    Raises:
        ToolError: if a tool is missing, or the emulation or the model of the core fails as a whole.
    """
    if place is None:
        require_tools()
    run = partial(run_guest, seed=seed, repeats=repeats, warmup=warmup, place=place)
    results = [counts_of(core, file, place) for file in run(core, paths, progress)]
    unsteady = {i: result for i, result in enumerate(results) if isinstance(result, Counts) and _is_unsteady(result)}
    if unsteady:  # mostly tiny ones
        wanted = [_BURST_INSTRUCTIONS // max(result.instructions, 1) for result in unsteady.values()]
        bursts = [min(_MOST_BURST, max(_LEAST_BURST, 1 + burst)) for burst in wanted]
        again = run(core, [paths[i] for i in unsteady], progress, repeats=repeats + 2, bursts=bursts)
        for i, file in zip(unsteady, again, strict=True):
            results[i] = counts_of(core, file, place)
    return [_steady(result) for result in results]


def counts_of(core: ArmCore, file: GuestFile, place: GuestPlace | None = None) -> Counts | str:
    """The counts of a file that ran in the guest; why there are none, as a sentence."""
    if file.error or not file.repeats:
        return file.error or _NOT_COUNTED
    ordered = sorted(file.repeats, key=lambda region: _instructions(file, region))
    instructions = [_instructions(file, region) for region in ordered]
    elsewhere = min(region.elsewhere / max(each, 1) for region, each in zip(ordered, instructions, strict=True))
    if elsewhere > _ELSEWHERE_RATIO:
        return (
            f"other threads execute {100 * elsewhere:.2g}% as much as the one that is counted, in every repeat: it "
            "runs on several threads, where one is modelled"
        )
    middle = ordered[len(ordered) // 2]
    classes: Counter[str] = Counter()
    executed: Counter[str] = Counter()
    macs = loaded = stored = 0
    for number, count in middle.blocks.items():
        block = file.blocks[number]
        executed[block.words] += count
        for name, each in block.classes.items():
            classes[name] += each * count
        macs += block.macs * count
        loaded += block.loaded_bytes * count
        stored += block.stored_bytes * count
    low = _model(core.mca_cpu).cycles(executed) / 1e3
    high = low + (middle.l1_misses * core.l1.miss_cycles + middle.l2_misses * core.l2.miss_cycles) / 1e3
    low, high = low / file.burst, high / file.burst
    by_class = {name: round(count / file.burst) for name, count in classes.most_common()}
    return Counts(
        core=core.title,
        instructions=sum(by_class.values()),
        classes=by_class,
        macs=round(macs / file.burst),
        loaded_bytes=round(loaded / file.burst),
        stored_bytes=round(stored / file.burst),
        l1_misses=round(middle.l1_misses / file.burst),
        l2_misses=round(middle.l2_misses / file.burst),
        kcycles_low=low,
        kcycles_high=high,
        clock_ghz=core.clock_ghz,
        repeats=len(file.repeats) * file.burst,
        spread_ratio=(instructions[-1] - instructions[0]) / max(instructions[0], 1),
        method=Method.EMULATED_COUNT,
        environment=Environment(
            cpu=f"{core.title} emulated by {place.name if place else _emulator_name()}",
            cores=1,
            system="Linux aarch64",
            runtime=file.runtime,
            threads=1,
        ),
        artifact_sha256=sha256_of_file(file.path),
    )


def is_refused(reason: str) -> bool:
    """Whether a file has no counts for what it is, so that another try would end the same.

    That is so where the runtime in the guest says no, or the core lacks an instruction. Guests that end in another way
    may have been stopped, missing counts may have met a full disk, and repeats that differ may agree next time.

    Args:
        reason: As `count_files` gives it.

    >>> is_refused("RuntimeError: no such operator"), is_refused("OSError: no such file")
    (True, False)
    """
    kind = getattr(builtins, reason.partition(": ")[0], None)  # of an exception in the guest, as bench.py has it
    is_of_guest = isinstance(kind, type) and issubclass(kind, (OSError, MemoryError, ImportError))
    has_ended = reason.startswith(GUEST) and "(SIGILL)" not in reason
    is_unsteady = reason.startswith(_UNSTEADY)
    return not (
        is_of_guest or has_ended or is_unsteady or reason in (_NOT_COUNTED, INCOMPLETE) or sounds_passing(reason)
    )


def require_counts(paths: Sequence[Path], results: Sequence[Counts | str]) -> list[Counts]:
    """The counts of all files.

    Raises:
        ToolError: if one has none.
    """
    for path, result in zip(paths, results, strict=True):
        if isinstance(result, str):
            raise ToolError(f"{path} cannot be counted: {result}")
    return [result for result in results if not isinstance(result, str)]


def compare_counts(
    core: ArmCore, paths: Sequence[Path], progress: Progress, *, seed: int = 0, place: GuestPlace | None = None
) -> list[Counts]:
    """Counts of whole files, at least one; speed-ups are relative to the first.

    Raises:
        ToolError: if one cannot be counted.
    """
    reference, *others = require_counts(paths, count_files(core, paths, progress, seed=seed, place=place))
    return [reference, *(_beside(reference, each) for each in others)]


def _beside(reference: Counts, counts: Counts) -> Counts:
    ratios = sorted((reference.kcycles_low / counts.kcycles_low, reference.kcycles_high / counts.kcycles_high))
    return replace(counts, speedup=reference.cost / counts.cost, speedup_low=ratios[0], speedup_high=ratios[1])


def _emulator_name() -> str:
    return f"qemu-aarch64 {tool_versions()['qemu']}"


@cache
def _model(mca_cpu: str) -> CycleModel:
    """One for the process: what it has priced serves all files."""
    return CycleModel(mca_cpu)


def _instructions(file: GuestFile, region: Region) -> int:
    return sum(file.blocks[number].length * count for number, count in region.blocks.items())


def _is_unsteady(counts: Counts) -> bool:
    return counts.spread_ratio > _SPREAD_RATIO


def _steady(result: Counts | str) -> Counts | str:
    if isinstance(result, Counts) and _is_unsteady(result):
        return (
            f"{_UNSTEADY} {100 * result.spread_ratio:.2g}% in instructions, more than "
            f"{100 * _SPREAD_RATIO:g}%: it does not do the same each time"
        )
    return result
