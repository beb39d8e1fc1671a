"""Numbers with their method: what was measured, how, where, and on which file."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

__all__ = ["Counts", "Environment", "Latency", "LayerCounts", "Measured", "Method", "Numerics", "Quality"]


class Method(Enum):
    """How a number came about; a column of a table never mixes two of them."""

    WALL_CLOCK = "measured time on this machine or a board"
    EMULATED_COUNT = "instructions counted under emulation"
    COMPILER_ESTIMATE = "cycles estimated by the target's compiler"
    ANALYTIC = "computed from shapes"


@dataclass(frozen=True, slots=True)
class Environment:
    """Where a number was measured.

    Attributes:
        cpu: Model name of the processor.
        cores: Logical cores that the process may use.
        system: Operating system and machine, such as 'Linux x86_64'.
        runtime: Name and version of the runtime, such as 'onnxruntime 1.31.1'.
        threads: Threads that the runtime was told to use.
        conditions: What else bears on the number and was noted at the time, such as the frequency governor of a board,
            its temperature and whether it throttled.
    """

    cpu: str
    cores: int
    system: str
    runtime: str
    threads: int
    conditions: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Compared:
    """A file beside the reference of the comparison.

    Attributes:
        speedup: Cost of the reference / this one; None for the reference.
        speedup_low: Lower end of it: of an interval where it was measured, of a range where it was modelled.
        speedup_high: Upper end.
    """

    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None


@dataclass(frozen=True, slots=True)
class Latency(_Compared):
    """Time of one inference of one file, from repeats interleaved with those of the files it is compared to.

    Attributes:
        median_ms: Median of the repeats.
        minimum_ms: Fastest repeat.
        p10_ms: 10th percentile.
        p90_ms: 90th percentile: with `p10_ms` the spread.
        repeats: Timed runs.
        warmup: Runs before the first timed one, each time that the file was loaded.
        method: How the time came about.
        environment: Machine, runtime and threads.
        artifact_sha256: Hash of the file.
        speedup: Median over six blocks, each with files loaded anew, of the block's median of the reference's time /
            this time in the same round; None for the reference.
        speedup_low: Lower end of the 95% interval of `speedup` (sign test on the blocks): the smallest of the six.
        speedup_high: Upper end of it: the largest.
    """

    median_ms: float
    minimum_ms: float
    p10_ms: float
    p90_ms: float
    repeats: int
    warmup: int
    method: Method
    environment: Environment
    artifact_sha256: str

    @property
    def cost(self) -> float:
        """What files are compared by, in milliseconds."""
        return self.median_ms


@dataclass(frozen=True, slots=True)
class Counts(_Compared):
    """What one inference of one file executes on an emulated Arm core, and what cycles a model of the core gives it.

    Never a time: the cycles are modelled, not measured. Low leaves out what waiting for memory costs, high counts
    every miss of the simulated caches in full, as if nothing overlapped and nothing was prefetched.

    Attributes:
        core: As Arm writes it, 'Cortex-A72'.
        instructions: Executed.
        classes: Class of instruction (docker/arm64/a64.h) -> how many of them; they sum to `instructions`.
        macs: Multiply-accumulates of all lanes.
        loaded_bytes: Bytes loaded.
        stored_bytes: Bytes stored.
        l1_misses: Misses of the first data cache.
        l2_misses: Of these, misses of the second.
        kcycles_low: Modelled kilocycles.
        kcycles_high: The same with the misses.
        clock_ghz: At which the core is stated to run.
        repeats: Inferences that were counted.
        spread_ratio: (most - fewest instructions of a repeat) / fewest.
        method: How the counts came about.
        environment: The core, the runtime in the emulated root and threads.
        artifact_sha256: Hash of the file.
        speedup: Cycles of the reference / these, at the low end; None for the reference.
        speedup_low: The smaller of the same ratios of the low and of the high ends; no interval of anything measured.
        speedup_high: The larger.
    """

    core: str
    instructions: int
    classes: dict[str, int]
    macs: int
    loaded_bytes: int
    stored_bytes: int
    l1_misses: int
    l2_misses: int
    kcycles_low: float
    kcycles_high: float
    clock_ghz: float
    repeats: int
    spread_ratio: float
    method: Method
    environment: Environment
    artifact_sha256: str

    @property
    def cost(self) -> float:
        """What files are compared by, in kilocycles: the low end, for the high one knows no prefetching."""
        return self.kcycles_low

    def classes_sum(self, kind: str) -> int:
        """Instructions of the class `kind` and of the same class on vectors: 'load' or 'store'."""
        return self.classes.get(kind, 0) + self.classes.get(f"vector_{kind}", 0)

    @property
    def low_ms(self) -> float:
        """Modelled milliseconds at the stated clock."""
        return self.kcycles_low / self.clock_ghz / 1e3

    @property
    def high_ms(self) -> float:
        """The same with the misses."""
        return self.kcycles_high / self.clock_ghz / 1e3


@dataclass(frozen=True, slots=True)
class LayerCounts:
    """What one layer adds to its file.

    Attributes:
        name: Operator and output tensor; several where a runtime runs them as one.
        instructions: Executed.
        macs: Multiply-accumulates of all lanes.
        l1_misses: Of the first data cache.
        kcycles_low: Modelled kilocycles.
        kcycles_high: The same with misses.
    """

    name: str
    instructions: int
    macs: int
    l1_misses: int
    kcycles_low: float
    kcycles_high: float


@dataclass(frozen=True, slots=True)
class Numerics:
    """Whether a file computes on an emulated Arm core what it computes on this machine, from one random input.

    Attributes:
        core: As Arm writes it, 'Cortex-A72'.
        difference: Largest difference of an output: in steps of its quantization where `is_in_steps`, else as a share
            of its largest value; None where a value is finite on one of the two only, or the file did not run.
        allowed: What rounding explains, in the same unit.
        is_in_steps: The unit.
        starts_at: The first layer at which it is larger; empty where it never is, or where that is not known.
        failure: Why the file could not be compared, as a clause; empty where it could.
        artifact_sha256: Hash of the file.
    """

    core: str
    difference: float | None
    allowed: float
    is_in_steps: bool
    starts_at: str
    failure: str
    artifact_sha256: str

    @property
    def is_same(self) -> bool:
        """Whether nothing differs by more than rounding."""
        return not self.failure and self.difference is not None and self.difference <= self.allowed


Measured = Latency | Counts
"""What a target says of a whole file."""


@dataclass(frozen=True, slots=True)
class Quality:
    """How well a network does on a set of images, alone and against the original network.

    Attributes:
        images: Images evaluated.
        accuracy_ratio: Share of images whose top-1 class is the label; None without labels.
        agreement_ratio: Share of images whose top-1 class is the original network's; None if outputs are not class
            scores.
        sqnr_db: 10 log10(sum y^2 / sum (y - y')^2) over all outputs, original y against y'; None where it is
            infinite (identical outputs) or for the original itself.
        relative_error: sqrt(sum (y - y')^2 / sum y^2); 0 for the original itself.
        drop_points: What `--max-drop` limits: points of accuracy with labels, else points of agreement, else of
            relative error (100 x `relative_error`); 0 for the original itself.
        drop_basis: Which of the three it is: 'accuracy', 'agreement' or 'relative error'.
    """

    images: int
    accuracy_ratio: float | None
    agreement_ratio: float | None
    sqnr_db: float | None
    relative_error: float
    drop_points: float
    drop_basis: str
