"""Measures the latency of several files against each other on a machine that is never quite idle.

Clock frequency, caches and other processes change over seconds, so files that are measured one after the other are not
comparable. Here every round runs every file once, in an order that changes from round to round, and speed-ups are
ratios within a round.

Rounds that share a loaded file are not independent: where its weights and buffers happen to lie in memory makes it a
little faster or slower for as long as it stays loaded. So the rounds come in blocks with files loaded anew, and what an
interval is made of are the blocks.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from sepdeploy.bench.environment import environment
from sepdeploy.bench.session import Session
from sepdeploy.core.files import sha256_of_file
from sepdeploy.core.measurement import Latency, Method
from sepdeploy.errors import UsageError

__all__ = ["balanced_orders", "measure", "median_interval", "timed_blocks"]

_BLOCKS = 6  # the fewest whose range encloses the median with at least 95% confidence
_MIN_BLOCK_ROUNDS = 4
_MAX_BLOCK_ROUNDS = 1000 // _BLOCKS
_MIN_BURST_NS = 200_000  # the clock's grain and the cost of reading it stay below 0.1 % of this


def measure(
    sessions: Mapping[str, Session],
    *,
    reference: str | None,
    threads: int,
    seconds: float = 2.0,
    warmup: int = 10,
    seed: int = 0,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> dict[str, Latency]:
    """Latency of each session, from interleaved rounds on random inputs.

    The work is cut into six blocks: the first uses `sessions`, every other one reopens them, so that an accident of
    how a file lies in memory counts once. In each block, after the warm-up, each round runs every session once, or a
    short burst of times if one run takes less than 0.2 ms; the order follows a balanced Latin square. The rounds of a
    block go on until they have taken `seconds` / 6 per session, but for at least 4 and at most 166. Python's garbage
    collector is off meanwhile.

    Times are pooled over all rounds. The speed-up of a block is the median of the ratios within its rounds;
    `Latency.speedup` is the median of the six, and their smallest and largest are its interval.

    Args:
        sessions: Name -> session, at least one; all were opened with `threads` threads.
        reference: Name of the session that `Latency.speedup` is relative to; None for no speed-ups.
        threads: Threads of the runtimes, for the record.
        seconds: Time to spend per session in all, positive.
        warmup: Runs of each session before the first round of each block, at least 1.
        seed: Seed of the random inputs.
        clock: Monotonic time in nanoseconds.

    Returns:
        One `Latency` per session, in the same order.

    Raises:
        UsageError: if there is no session, `reference` is not one of them, a number is outside its range, or a file
            cannot be loaded again.
        ToolError: if a session fails to run.
    """
    if not sessions or seconds <= 0 or warmup < 1:
        raise UsageError(
            f"timing needs at least one file, a positive time and a warm-up run, got {len(sessions)} files, "
            f"{seconds} s and {warmup} runs"
        )
    if reference is not None and reference not in sessions:
        raise UsageError(f"the reference '{reference}' is not among the timed files: {', '.join(sessions)}")
    blocks_ns = timed_blocks(list(sessions.values()), seconds=seconds, warmup=warmup, seed=seed, clock=clock)
    names = list(sessions)
    return {
        name: _latency(
            session,
            [block[:, i] for block in blocks_ns],
            None if reference in (None, name) else [block[:, names.index(reference)] for block in blocks_ns],
            warmup=warmup,
            threads=threads,
        )
        for i, (name, session) in enumerate(sessions.items())
    }


def timed_blocks(
    sessions: Sequence[Session],
    *,
    seconds: float,
    warmup: int,
    seed: int,
    clock: Callable[[], int] = time.perf_counter_ns,
    is_rewarmed: bool = False,
) -> list[np.ndarray]:
    """Six blocks of interleaved rounds, as `measure` takes them; all but the first reopen the sessions.

    Args:
        sessions: At least one.
        seconds: Time to spend per session in all.
        warmup: Runs of each session before the first round of each block.
        seed: Seed of the random inputs.
        clock: Monotonic time in nanoseconds.
        is_rewarmed: Whether each session runs once more, untimed, before it is timed: among many sessions the others
            have emptied the caches of its weights.

    Returns:
        Nanoseconds per run in each block, (rounds, sessions) float64.

    Raises:
        UsageError: if a file cannot be loaded again.
        ToolError: if a session fails to run.
    """
    orders = balanced_orders(len(sessions))
    blocks = []
    with _collector_off():
        for block in range(_BLOCKS):
            # Who is loaded first may get the better place in memory, so that changes from block to block as well.
            order = orders[block % len(orders)]
            if block > 0:
                sessions = _reopened(sessions, order)
            bursts = [1] * len(sessions)
            for i in order:
                sessions[i].set_random_input(seed)
                bursts[i] = _burst(sessions[i], warmup, clock)
            blocks.append(_timed_rounds(sessions, bursts, seconds / _BLOCKS, clock, is_rewarmed=is_rewarmed))
    return blocks


def balanced_orders(count: int) -> tuple[tuple[int, ...], ...]:
    """Orders of `count` items in which each item comes equally often at each place and after each other item.

    A balanced Latin square (Williams, 1949); an odd count needs its mirror image as well.

    >>> balanced_orders(2)
    ((0, 1), (1, 0))
    """
    first = [(step + 1) // 2 if step % 2 else (count - step // 2) % count for step in range(count)]
    square = tuple(tuple((item + shift) % count for item in first) for shift in range(count))
    return square if count % 2 == 0 else square + tuple(order[::-1] for order in square)


def median_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Distribution-free interval that holds the median of what `values` were drawn from with at least 95% confidence.

    From the order statistics: of n values, the number below the true median is binomial (n, 1/2), so the j-th smallest
    and the j-th largest enclose it with probability 1 - 2 P(Binomial < j). With fewer than six values no pair reaches
    95% and the interval is their whole range.

    >>> median_interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    (1.0, 6.0)
    """
    ordered = sorted(float(value) for value in values)
    count = len(ordered)
    below = 0
    rank = 0
    while True:
        below += math.comb(count, rank)
        if 40 * below > 2**count:  # more than 2.5% in this tail; exact, in integers
            break
        rank += 1
    rank = max(rank, 1)
    return ordered[rank - 1], ordered[count - rank]


@contextmanager
def _collector_off() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _burst(session: Session, warmup: int, clock: Callable[[], int]) -> int:
    """Warm `session` up and return how many runs make a burst that the clock can time."""
    fastest_ns = min(_run_ns(session, 1, clock) for _ in range(warmup))
    return math.ceil(_MIN_BURST_NS / max(fastest_ns, 1)) if fastest_ns < _MIN_BURST_NS else 1


def _run_ns(session: Session, runs: int, clock: Callable[[], int]) -> int:
    run_once = session.run_once
    start = clock()
    for _ in range(runs):
        run_once()
    return clock() - start


def _reopened(sessions: Sequence[Session], order: Sequence[int]) -> list[Session]:
    """Fresh sessions of the same files; the old ones stay until all are open, so that none inherits its place."""
    fresh = list(sessions)
    for i in order:
        fresh[i] = sessions[i].reopen()
    return fresh


def _timed_rounds(
    sessions: Sequence[Session],
    bursts: Sequence[int],
    seconds: float,
    clock: Callable[[], int],
    *,
    is_rewarmed: bool,
) -> np.ndarray:
    """Nanoseconds per run, (rounds, sessions) float64."""
    orders = balanced_orders(len(sessions))
    budget_ns = seconds * len(sessions) * 1e9
    spent_ns = 0
    rounds: list[list[float]] = []
    while len(rounds) < _MIN_BLOCK_ROUNDS or (spent_ns < budget_ns and len(rounds) < _MAX_BLOCK_ROUNDS):
        times = [0.0] * len(sessions)
        for i in orders[len(rounds) % len(orders)]:
            if is_rewarmed:
                spent_ns += _run_ns(sessions[i], 1, clock)
            burst_ns = _run_ns(sessions[i], bursts[i], clock)
            spent_ns += burst_ns
            times[i] = max(burst_ns, 1) / bursts[i]  # a clock that stood still still gives a finite ratio
        rounds.append(times)
    return np.array(rounds)


def _latency(
    session: Session,
    blocks_ns: Sequence[np.ndarray],
    reference_ns: Sequence[np.ndarray] | None,
    *,
    warmup: int,
    threads: int,
) -> Latency:
    times_ms = np.concatenate(blocks_ns) / 1e6
    speedup = low = high = None
    if reference_ns is not None:
        speedups = [float(np.median(ref / own)) for ref, own in zip(reference_ns, blocks_ns, strict=True)]
        speedup = float(np.median(speedups))
        low, high = median_interval(speedups)
    p10, p90 = np.percentile(times_ms, (10, 90))
    return Latency(
        median_ms=float(np.median(times_ms)),
        minimum_ms=float(times_ms.min()),
        p10_ms=float(p10),
        p90_ms=float(p90),
        repeats=len(times_ms),
        warmup=warmup,
        method=Method.WALL_CLOCK,
        environment=environment(session.runtime, threads),
        artifact_sha256=sha256_of_file(session.path),
        speedup=speedup,
        speedup_low=low,
        speedup_high=high,
    )
