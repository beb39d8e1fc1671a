from __future__ import annotations

import gc
import hashlib
import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from sepdeploy.bench.timing import balanced_orders, measure, median_interval
from sepdeploy.core.measurement import Method
from sepdeploy.errors import UsageError


class Machine:
    """A clock that only runs advance, and a log of them."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.runs: list[str] = []
        self.slowdown = 1.0

    def clock(self) -> int:
        return self.now_ns


class FakeSession:
    """Takes as long as it is told to."""

    runtime = "fake 1.0"
    input_shape = (1, 3)

    def __init__(self, machine: Machine, name: str, run_ns: int, folder: Path) -> None:
        self.machine, self.name, self.run_ns = machine, name, run_ns
        self.path = folder / name
        self.path.write_text(name)
        self.seeds: list[int] = []
        self.was_collecting = False
        self.reopened: list[FakeSession] = []  # all that came of it

    def predict(self, batch: np.ndarray) -> tuple[np.ndarray, ...]:
        return (batch,)

    def set_random_input(self, seed: int) -> None:
        self.seeds.append(seed)

    def reopen(self) -> FakeSession:
        fresh = FakeSession(self.machine, self.name, self.run_ns, self.path.parent)
        self.reopened.append(fresh)
        fresh.reopened = self.reopened
        return fresh

    def run_once(self) -> None:
        self.was_collecting |= gc.isenabled()
        self.machine.runs.append(self.name)
        # Every 16th run is disturbed, and the machine slows down all the time.
        disturbed = 3.0 if len(self.machine.runs) % 16 == 0 else 1.0
        self.machine.now_ns += int(self.run_ns * disturbed * self.machine.slowdown)


def sessions(machine: Machine, folder: Path, **run_ns: int) -> dict[str, FakeSession]:
    return {name: FakeSession(machine, name, time_ns, folder) for name, time_ns in run_ns.items()}


def test_latency_of_two_files(tmp_path: Path) -> None:
    machine = Machine()
    files = sessions(machine, tmp_path, dense=4_000_000, separable=1_000_000)
    latencies = measure(files, reference="dense", threads=2, seconds=0.25, warmup=3, seed=7, clock=machine.clock)

    assert list(latencies) == ["dense", "separable"]
    dense, separable = latencies["dense"], latencies["separable"]
    assert dense.median_ms == dense.minimum_ms == dense.p10_ms == 4.0
    assert separable.median_ms == separable.minimum_ms == 1.0
    assert (dense.speedup, dense.speedup_low, dense.speedup_high) == (None, None, None)
    assert (separable.speedup, separable.speedup_low, separable.speedup_high) == (4.0, 4.0, 4.0)
    # 0.5 s for both at a little over 5 ms a round, and up to one round more in each block
    assert dense.repeats == separable.repeats
    assert 80 <= dense.repeats <= 106
    assert dense.warmup == 3
    assert dense.method is Method.WALL_CLOCK
    assert (dense.environment.runtime, dense.environment.threads) == ("fake 1.0", 2)
    assert dense.artifact_sha256 == hashlib.sha256(b"dense").hexdigest()
    assert [session.seeds for session in (files["dense"], *files["dense"].reopened)] == [[7]] * 6


def test_warm_up_comes_first_and_the_order_alternates(tmp_path: Path) -> None:
    machine = Machine()
    files = sessions(machine, tmp_path, a=1_000_000, b=1_000_000)
    measure(files, reference=None, threads=1, seconds=0.01, warmup=4, clock=machine.clock)
    assert machine.runs[:8] == ["a"] * 4 + ["b"] * 4
    assert machine.runs[8:16] == ["a", "b", "b", "a", "a", "b", "b", "a"]


def test_rounds_have_a_floor_and_a_ceiling(tmp_path: Path) -> None:
    slow, fast = Machine(), Machine()
    kept = measure(
        sessions(slow, tmp_path, a=10**10), reference=None, threads=1, seconds=1.0, warmup=1, clock=slow.clock
    )
    assert kept["a"].repeats == 6 * 4
    kept = measure(
        sessions(fast, tmp_path, a=300_000), reference=None, threads=1, seconds=60.0, warmup=1, clock=fast.clock
    )
    assert kept["a"].repeats == 6 * 166


def test_short_runs_are_timed_in_bursts(tmp_path: Path) -> None:
    machine = Machine()
    files = sessions(machine, tmp_path, short=30_000, long=200_000)
    latencies = measure(files, reference="long", threads=1, seconds=1e-9, warmup=5, clock=machine.clock)
    counts = Counter(machine.runs)
    # 6 blocks of a warm-up and 4 rounds; 7 x 30 us is the first burst above 200 us
    assert counts == {"short": 6 * (5 + 4 * 7), "long": 6 * (5 + 4)}
    assert latencies["short"].minimum_ms == pytest.approx(0.03)
    assert latencies["long"].minimum_ms == 0.2


def test_a_clock_too_coarse_for_one_run_still_gives_finite_numbers(tmp_path: Path) -> None:
    machine = Machine()
    files = sessions(machine, tmp_path, a=0, b=1_000_000)
    (latency, _) = measure(files, reference="b", threads=1, seconds=1e-9, warmup=1, clock=machine.clock).values()
    assert latency.speedup is not None
    assert math.isfinite(latency.speedup)


def test_speed_up_survives_a_machine_that_slows_down(tmp_path: Path) -> None:
    machine = Machine()
    files = sessions(machine, tmp_path, dense=2_000_000, separable=1_000_000)

    def drifting_clock() -> int:
        machine.slowdown *= 1.01
        return machine.now_ns

    latencies = measure(files, reference="dense", threads=1, seconds=0.2, warmup=1, clock=drifting_clock)
    low, speedup, high = (
        latencies["separable"].speedup_low,
        latencies["separable"].speedup,
        latencies["separable"].speedup_high,
    )
    assert latencies["dense"].p90_ms > 1.5 * latencies["dense"].p10_ms  # the drift is large
    assert speedup == pytest.approx(2.0, rel=0.03)
    assert low <= speedup <= high
    assert (low, high) == pytest.approx((2.0, 2.0), rel=0.03)


def test_collector_is_off_meanwhile_and_on_again(tmp_path: Path) -> None:
    machine = Machine()
    files = sessions(machine, tmp_path, a=1_000_000)
    assert gc.isenabled()
    measure(files, reference=None, threads=1, seconds=0.01, clock=machine.clock)
    assert gc.isenabled()
    assert not any(session.was_collecting for session in (files["a"], *files["a"].reopened))


class LuckySession(FakeSession):
    """Each time it is loaded it has another speed, which then stays, as where a file lies in memory decides it."""

    luck = np.random.default_rng()

    def __init__(self, machine: Machine, name: str, run_ns: int, folder: Path) -> None:
        super().__init__(machine, name, int(run_ns * self.luck.uniform(0.9, 1.1)), folder)

    def reopen(self) -> LuckySession:
        return LuckySession(self.machine, self.name, 1_000_000, self.path.parent)


def test_interval_of_a_file_against_itself_holds_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LuckySession, "luck", np.random.default_rng(0))
    holds_one = []
    for _ in range(20):
        machine = Machine()
        files = {name: LuckySession(machine, "same", 1_000_000, tmp_path) for name in "ab"}
        latency = measure(files, reference="a", threads=1, seconds=1e-9, warmup=1, clock=machine.clock)["b"]
        assert latency.speedup_low < latency.speedup < latency.speedup_high
        holds_one.append(latency.speedup_low <= 1 <= latency.speedup_high)
    assert sum(holds_one) >= 18  # 97% of 20 on average


def test_interval_is_the_range_of_the_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block_ns = iter([1_000_000, 800_000, 1_250_000, 1_000_000, 2_000_000, 500_000])
    monkeypatch.setattr(
        FakeSession,
        "reopen",
        lambda self: FakeSession(
            self.machine, self.name, next(block_ns) if self.name == "b" else self.run_ns, self.path.parent
        ),
    )
    machine = Machine()
    files = sessions(machine, tmp_path, a=1_000_000, b=next(block_ns))
    latency = measure(files, reference="a", threads=1, seconds=1e-9, warmup=1, clock=machine.clock)["b"]
    assert (latency.speedup, latency.speedup_low, latency.speedup_high) == (1.0, 0.5, 2.0)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7])
def test_orders_are_balanced(count: int) -> None:
    orders = balanced_orders(count)
    assert all(sorted(order) == list(range(count)) for order in orders)
    for place in range(count):
        assert len(set(Counter(order[place] for order in orders).values())) == 1
    neighbours = Counter(pair for order in orders for pair in pairwise(order))
    assert len(neighbours) == count * (count - 1)  # everyone follows everyone
    assert len(set(neighbours.values())) <= 1  # equally often


def test_median_interval_matches_tables() -> None:
    # Ranks of the 95% sign-test interval: n = 10 -> 2 and 9, 20 -> 6 and 15, 30 -> 10 and 21, 100 -> 40 and 61
    for count, (low, high) in {10: (2, 9), 20: (6, 15), 30: (10, 21), 100: (40, 61)}.items():
        values = np.random.default_rng(0).permutation(np.arange(1, count + 1))
        assert median_interval(values) == (low, high)
    assert median_interval([3.0]) == (3.0, 3.0)
    assert median_interval([3.0, 1.0]) == (1.0, 3.0)


def test_wrong_requests(tmp_path: Path) -> None:
    files = sessions(Machine(), tmp_path, a=1)
    with pytest.raises(UsageError, match="'b' is not among the timed files: a"):
        measure(files, reference="b", threads=1)
    for options in ({"seconds": 0.0}, {"warmup": 0}):
        with pytest.raises(UsageError, match="timing needs"):
            measure(files, reference=None, threads=1, **options)
    with pytest.raises(UsageError, match="got 0 files"):
        measure({}, reference=None, threads=1)
