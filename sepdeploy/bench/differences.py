"""Measures how much longer or shorter files take than one of them, spending time only where it can still matter."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sepdeploy.bench.session import Session
from sepdeploy.bench.timing import median_interval, timed_blocks

__all__ = ["Difference", "measure_differences"]

_PASS_SECONDS = 0.1
_WARMUP = 3  # the first run allocates, the second finds the caches filled

_TIGHT_RATIO = 0.03
"""An interval this narrow, as a share of the reference's time, is left alone."""

_NOISE_MS = 1e-3
"""So is one of a microsecond: calls from Python vary by as much."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Time of one inference of a file beside that of the reference, in the same rounds.

    Attributes:
        median_ms: Of the file: median over the blocks of the block's median.
        reference_ms: Of the reference, in the same way.
        difference_ms: Of the differences within rounds, in the same way; below 0 the file is faster.
        low_ms: Lower end of the 95% interval of the difference (sign test on the blocks).
        high_ms: Upper end.
        repeats: Rounds.
    """

    median_ms: float
    reference_ms: float
    difference_ms: float
    low_ms: float
    high_ms: float
    repeats: int

    @property
    def is_settled(self) -> bool:
        """Whether more rounds would not change a decision: it is known well enough, or it is no gain."""
        width_ms = self.high_ms - self.low_ms
        return self.low_ms >= 0 or width_ms <= max(_TIGHT_RATIO * self.reference_ms, _NOISE_MS)


def measure_differences(
    reference: Session,
    others: Sequence[Session],
    *,
    seconds: float,
    seed: int = 0,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> list[Difference]:
    """Difference of each session to the reference, from interleaved rounds on random inputs.

    A first pass of six blocks (`timed_blocks`) is over all sessions. Every further one is over those that are not
    settled and adds six blocks, with all files loaded anew, until none is left or `seconds` are spent.

    Args:
        reference: What all are compared to; it takes part in every pass.
        others: The sessions.
        seconds: Most time to spend per session, positive, but at least one pass of 24 rounds.
        seed: Seed of the random inputs.
        clock: Monotonic time in nanoseconds.

    Returns:
        One difference per session, in order.

    Raises:
        UsageError: if a file cannot be loaded again.
        ToolError: if a session fails to run.
    """
    blocks_ns: list[list[np.ndarray]] = [[] for _ in others]  # per session, (rounds, 2): the reference and itself
    results: list[Difference] = []
    open_places = list(range(len(others)))
    passes = max(1, round(seconds / _PASS_SECONDS))
    for number in range(passes):
        if not open_places:
            break
        sessions = [reference, *(others[i] for i in open_places)]
        if number > 0:
            sessions = [session.reopen() for session in sessions]
        for block in timed_blocks(
            sessions, seconds=seconds / passes, warmup=_WARMUP, seed=seed, clock=clock, is_rewarmed=True
        ):
            for column, i in enumerate(open_places, 1):
                blocks_ns[i].append(block[:, (0, column)])
        results = [_difference(blocks) for blocks in blocks_ns]
        open_places = [i for i in open_places if not results[i].is_settled]
    return results


def _difference(blocks_ns: Sequence[np.ndarray]) -> Difference:
    medians_ms = np.array([(*np.median(block, 0), np.median(block[:, 1] - block[:, 0])) for block in blocks_ns]) / 1e6
    reference_ms, median_ms, difference_ms = (float(value) for value in np.median(medians_ms, 0))
    low_ms, high_ms = median_interval(medians_ms[:, 2])
    return Difference(median_ms, reference_ms, difference_ms, low_ms, high_ms, sum(map(len, blocks_ns)))
