from __future__ import annotations

from collections import Counter
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest

from sepdeploy.bench.differences import Difference, measure_differences


class Machine:
    """A clock that only runs advance, and a log of them."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.runs: Counter[str] = Counter()
        self.loads: Counter[str] = Counter()

    def clock(self) -> int:
        return self.now_ns


class LoadedSession:
    """Each load of the file takes the next of its times, as where it lies in memory decides it."""

    runtime = "fake 1.0"
    input_shape = (1, 3)

    def __init__(self, machine: Machine, name: str, loads_ns: cycle[int]) -> None:
        self.machine, self.name, self.loads_ns = machine, name, loads_ns
        self.path = Path(name)
        self.run_ns = next(loads_ns)
        machine.loads[name] += 1

    def predict(self, batch: np.ndarray) -> tuple[np.ndarray, ...]:
        return (batch,)

    def set_random_input(self, seed: int) -> None:
        self.seed = seed

    def reopen(self) -> LoadedSession:
        return LoadedSession(self.machine, self.name, self.loads_ns)

    def run_once(self) -> None:
        self.machine.runs[self.name] += 1
        self.machine.now_ns += self.run_ns


def measured(seconds: float, dense: list[float], *others: list[float]) -> tuple[Machine, list[Difference]]:
    """Times of successive loads in us; the last file is 'other0', 'other1', ..."""
    machine = Machine()
    sessions = [
        LoadedSession(machine, name, cycle([int(1000 * us) for us in loads]))
        for name, loads in zip(("dense", "other0", "other1"), (dense, *others), strict=False)
    ]
    return machine, measure_differences(sessions[0], sessions[1:], seconds=seconds, clock=machine.clock)


def test_differences_are_paired() -> None:
    _, (faster, slower) = measured(0.15, [4000], [1000], [5000])
    assert (faster.median_ms, faster.reference_ms, faster.difference_ms) == (1.0, 4.0, -3.0)
    assert (faster.low_ms, faster.high_ms) == (-3.0, -3.0)
    assert (slower.median_ms, slower.difference_ms) == (5.0, 1.0)
    assert faster.repeats == slower.repeats >= 24


def test_settled_sessions_are_measured_once() -> None:
    machine, _ = measured(5.0, [4000], [1000], [5000])
    assert machine.loads == {"dense": 6, "other0": 6, "other1": 6}


def test_only_what_is_not_known_well_and_may_gain_is_measured_further() -> None:
    # The first is a gain of 0.9 to 1.1 ms: 5% of dense. The second is a loss of 0.9 to 1.1 ms.
    machine, (unsure, loss) = measured(0.3, [4000], [2900, 3100], [4900, 5100])
    assert machine.loads == {"dense": 18, "other0": 18, "other1": 6}
    assert unsure.repeats > 2 * loss.repeats
    assert (unsure.low_ms, unsure.high_ms) == pytest.approx((-1.1, -0.9))


def test_more_passes_narrow_the_interval() -> None:
    loads = [3000, 3000, 3000, 3000, 3000, 3300]  # one load in six is unlucky: after 12, the interval leaves both out
    _, (first,) = measured(0.15, [4000], loads)
    machine, (second,) = measured(5.0, [4000], loads)
    assert (first.low_ms, first.high_ms) == pytest.approx((-1.0, -0.7))
    assert (second.low_ms, second.high_ms) == pytest.approx((-1.0, -1.0))
    assert machine.loads["other0"] == 12


def test_the_time_is_a_limit() -> None:
    machine, _ = measured(0.2, [4000], [2000, 3000])
    assert machine.loads["other0"] == 12
    assert machine.now_ns < 2 * (0.2 + 0.25) * 1e9


def test_a_microsecond_is_noise() -> None:
    machine, _ = measured(0.6, [20], [10, 10.9])  # 4.5% of dense, but less than 1 us
    assert machine.loads["other0"] == 6


def test_nothing_to_compare() -> None:
    assert measured(1.0, [4000])[1] == []


class ForgetfulSession(LoadedSession):
    """Takes ten times as long where another session has run since its own last run."""

    def run_once(self) -> None:
        last = getattr(self.machine, "last", None)
        self.machine.now_ns += 9 * self.run_ns * (last != self.name)
        self.machine.last = self.name
        super().run_once()


def test_what_other_sessions_do_to_the_caches_is_not_timed() -> None:
    machine = Machine()
    sessions = [ForgetfulSession(machine, name, cycle([us * 1000])) for name, us in (("dense", 500), ("other", 300))]
    (found,) = measure_differences(sessions[0], sessions[1:], seconds=0.2, clock=machine.clock)
    assert (found.reference_ms, found.median_ms, found.difference_ms) == (0.5, 0.3, -0.2)
