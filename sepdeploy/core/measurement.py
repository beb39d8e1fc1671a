"""Numbers with their method: what was measured, how, where, and on which file."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

__all__ = ["Environment", "Latency", "Method", "Quality"]


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


@dataclass(frozen=True, slots=True)
class Latency:
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
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None


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
