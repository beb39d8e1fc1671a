from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from sepdeploy.core.artifact import Artifact, Format, Precision
from sepdeploy.core.chain import ChainSum
from sepdeploy.core.conv import ConvSpec
from sepdeploy.core.measurement import Latency, Method
from sepdeploy.core.price_cache import PriceCache
from sepdeploy.core.progress import Progress
from sepdeploy.core.selection import FusedBlock, Price, Unpriced
from sepdeploy.errors import ToolError
from sepdeploy.planning.fused_block import dense_block
from sepdeploy.planning.price import NOT_MEASURED, price_blocks
from sepdeploy.planning.target import Target

DENSE = dense_block(ConvSpec(8, 8, (3, 3), padding=(1, 1, 1, 1)), (12, 12))
WIDE = dense_block(ConvSpec(8, 16, (3, 3), padding=(1, 1, 1, 1)), (12, 12))
A, B, C = (replace(DENSE, lowering=(name,)) for name in "abc")


class CountingTarget:
    """Takes 10 s for each block, cannot build blocks with the lowering 'c', and fails as a whole at 'broken'."""

    name, format, precision, threads, unit, method = (
        "core",
        Format.TFLITE,
        Precision.INT8,
        1,
        "kcycles",
        Method.EMULATED_COUNT,
    )

    def __init__(self, *, is_lasting: bool = True) -> None:
        self.is_lasting = is_lasting
        self.measured: list[tuple[FusedBlock, tuple[FusedBlock, ...]]] = []
        self.now = 0.0
        self.seconds: set[float] = set()

    def clock(self) -> float:
        return self.now

    def key(self) -> dict[str, object]:
        return {"target": self.name, "precision": "int8", "threads": 1, "runtime": "emulator 1", "cpu": "core"}

    def lowerings(self, form: ChainSum) -> tuple[tuple[str, ...], ...]:
        return ((),)

    def compare(self, files: Sequence[Artifact], *, seconds: float, seed: int) -> list[Latency]:
        raise AssertionError

    def measure(
        self, dense: FusedBlock, others: Sequence[FusedBlock], *, seconds: float, seed: int, progress: Progress
    ) -> list[Price | Unpriced]:
        self.measured.append((dense, tuple(others)))
        self.now += 10 * len(others)
        self.seconds.add(seconds)
        progress.stage("counting")
        if any(block.lowering == ("broken",) for block in others):
            raise ToolError("the emulator crashed")
        return [
            Unpriced("it cannot be built", self.is_lasting)
            if block == C
            else Price(n, 9.0, n - 9, n - 9, n - 9, "kcycles", 1, self.method)
            for n, block in enumerate(others, 1)
        ]


@pytest.fixture
def cache(tmp_path: Path) -> PriceCache:
    return PriceCache(tmp_path / "prices.sqlite3")


def test_a_counting_target_satisfies_the_protocol() -> None:
    target: Target = CountingTarget()
    assert target.unit == "kcycles"


def test_each_block_is_measured_once_and_never_again(cache: PriceCache) -> None:
    target = CountingTarget()
    groups = {DENSE: [A, B, A], WIDE: [A]}
    first = price_blocks(target, groups, cache, seconds_per_block=0.25)
    assert target.measured == [(DENSE, (A, B)), (WIDE, (A,))]
    assert list(first) == [(DENSE, A), (DENSE, B), (WIDE, A)]
    assert (first[DENSE, A].value, first[DENSE, B].value, first[WIDE, A].value) == (1, 2, 1)
    assert target.seconds == {0.25}
    cache.close()
    again = CountingTarget()
    assert price_blocks(again, groups, PriceCache(cache.path), seconds_per_block=0.25) == first
    assert again.measured == []
    price_blocks(again, groups, PriceCache(cache.path), seconds_per_block=1.0)
    assert len(again.measured) == 2, "what was timed in a hurry does not last"


def test_only_what_is_missing_is_measured(cache: PriceCache) -> None:
    price_blocks(CountingTarget(), {DENSE: [A]}, cache)
    target = CountingTarget()
    prices = price_blocks(target, {DENSE: [A, B]}, cache)
    assert target.measured == [(DENSE, (B,))]
    assert set(prices) == {(DENSE, A), (DENSE, B)}


def test_what_cannot_be_built_is_remembered_with_its_reason(cache: PriceCache, monkeypatch: pytest.MonkeyPatch) -> None:
    target = CountingTarget()
    prices = price_blocks(target, {DENSE: [A, C]}, cache)
    assert prices[DENSE, C] == "it cannot be built"
    assert isinstance(prices[DENSE, A], Price)
    assert price_blocks(target, {DENSE: [A, C]}, cache) == prices
    assert len(target.measured) == 1
    price_blocks(target, {DENSE: [C]}, cache, seconds_per_block=1.0)
    assert len(target.measured) == 1, "more time changes nothing about it"
    monkeypatch.setattr("sepdeploy.planning.price.__version__", "99.0")
    price_blocks(target, {DENSE: [A, C]}, cache)
    assert target.measured[1:] == [(DENSE, (C,))], "another version may build it"


def test_what_the_machine_failed_at_is_tried_again(cache: PriceCache) -> None:
    target = CountingTarget(is_lasting=False)
    prices = price_blocks(target, {DENSE: [A, C]}, cache)
    assert prices[DENSE, C] == f"{NOT_MEASURED}it cannot be built"
    price_blocks(target, {DENSE: [A, C]}, cache)
    assert target.measured[1:] == [(DENSE, (C,))]


def test_the_budget_is_held_and_the_rest_says_so(cache: PriceCache) -> None:
    target = CountingTarget()
    prices = price_blocks(target, {DENSE: [A, B], WIDE: [A]}, cache, budget_seconds=15, clock=target.clock)
    assert isinstance(prices[DENSE, B], Price)
    assert prices[WIDE, A] == "not measured: the 15 s for measuring were spent before its turn"
    # What is known costs nothing, so that a second run gets further.
    target = CountingTarget()
    assert isinstance(
        price_blocks(target, {DENSE: [A, B], WIDE: [A]}, cache, budget_seconds=15, clock=target.clock)[WIDE, A], Price
    )


def test_no_budget_measures_nothing(cache: PriceCache) -> None:
    target = CountingTarget()
    prices = price_blocks(target, {DENSE: [A]}, cache, budget_seconds=0, clock=target.clock)
    assert target.measured == []
    assert "the 0 s" in prices[DENSE, A]


def test_many_blocks_are_measured_in_batches_that_are_kept(cache: PriceCache) -> None:
    blocks = [replace(DENSE, lowering=(f"l{number}",)) for number in range(20)]
    broken = replace(DENSE, lowering=("broken",))
    target = CountingTarget()
    with pytest.raises(ToolError, match="crashed"):
        price_blocks(target, {DENSE: [*blocks, broken]}, cache)
    assert [len(others) for _, others in target.measured] == [16, 5]
    again = CountingTarget()
    price_blocks(again, {DENSE: blocks}, cache)
    assert [len(others) for _, others in again.measured] == [4]


def test_progress_says_how_far_it_is(cache: PriceCache) -> None:
    texts: list[str] = []

    class Shown:
        def stage(self, text: str) -> None:
            texts.append(text)

        def step(self, done: int, total: int) -> None:
            raise AssertionError

    price_blocks(CountingTarget(), {DENSE: [A, B], WIDE: [A]}, cache, progress=Shown())
    assert texts == ["0 of 3 forms priced: counting", "2 of 3 forms priced: counting"]
