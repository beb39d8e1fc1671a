"""Prices of blocks on a target: each is measured once, and remembered, as is what cannot be built or run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from sepdeploy.core.price_cache import PriceCache
from sepdeploy.core.progress import Progress, Silent
from sepdeploy.core.selection import FusedBlock, Price, Unpriced
from sepdeploy.planning.target import Target
from sepdeploy.version import RULES, __version__

__all__ = ["NOT_MEASURED", "first_reason", "price_blocks"]

NOT_MEASURED = "not measured: "
"""How the reason begins of a block that the next run is to try: the time did not last for it, or the machine failed."""

_TOGETHER = 16
"""Blocks that are measured in one go: after each, prices are kept and the time is looked at."""


def price_blocks(
    target: Target,
    groups: Mapping[FusedBlock, Sequence[FusedBlock]],
    cache: PriceCache,
    *,
    seconds_per_block: float = 0.2,
    budget_seconds: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> dict[tuple[FusedBlock, FusedBlock], Price | str]:
    """Price blocks beside the layers that they would replace; what is in the cache is not measured again.

    Args:
        target: Where.
        groups: Block of a layer as it is -> blocks that it could become, with the same input and activation. Where
            `budget_seconds` may not last for all, the first come first.
        cache: What is known; new prices are added as soon as they are measured, and blocks that the exporter or the
            runtime refuses. What failed for want of memory, disk or time is not remembered.
        seconds_per_block: Most time to spend on the runs of one block.
        budget_seconds: Most time to spend in all, writing files included; None for no limit. What has begun is
            finished.
        seed: Seed of the random inputs.
        progress: Told what is going on.
        clock: Monotonic time in seconds.

    Returns:
        (dense block, other block) -> its price, or a sentence that says why it has none.

    Raises:
        ToolError: if the target fails as a whole; what was measured until then is in the cache.
    """
    where = target.key()
    key = {**where, "seconds": seconds_per_block}  # what was timed in a hurry is not to last
    refusal_key = {**where, "sepdeploy": f"{__version__}, rules {RULES}"}  # another version may know how to write it
    prices: dict[tuple[FusedBlock, FusedBlock], Price | str] = {}
    missing: dict[FusedBlock, list[FusedBlock]] = {}
    for dense, others in groups.items():
        for block in dict.fromkeys(others):
            known = cache.get(key, dense, block) or cache.refusal(refusal_key, dense, block)
            if known is None:
                missing.setdefault(dense, []).append(block)
            else:
                prices[dense, block] = known
    counted = _Counted(progress or Silent(), sum(map(len, missing.values())))
    start = clock()
    for dense, blocks in _batches(missing):
        if budget_seconds is not None and clock() - start >= budget_seconds:
            spent = f"{NOT_MEASURED}the {budget_seconds:g} s for measuring were spent before its turn"
            prices.update({(dense, block): spent for block in blocks})
            continue
        found = target.measure(dense, blocks, seconds=seconds_per_block, seed=seed, progress=counted)
        priced = dict(zip(blocks, found, strict=True))
        cache.put(key, dense, {block: price for block, price in priced.items() if isinstance(price, Price)})
        refused = {block: each for block, each in priced.items() if isinstance(each, Unpriced)}
        cache.put_refusals(
            refusal_key, dense, {block: each.reason for block, each in refused.items() if each.is_lasting}
        )
        prices.update({(dense, block): _told(price) for block, price in priced.items()})
        counted.done += len(blocks)
    return prices


def _told(found: Price | Unpriced) -> Price | str:
    """A price, or the sentence that says why there is none."""
    if isinstance(found, Price):
        return found
    return found.reason if found.is_lasting else f"{NOT_MEASURED}{found.reason}"


def first_reason(reasons: Sequence[str]) -> str:
    """The first that the next run may do away with, so that it tries; else the first.

    >>> first_reason(["no such operator", f"{NOT_MEASURED}no memory"])
    'not measured: no memory'
    """
    return min(reasons, key=lambda reason: not reason.startswith(NOT_MEASURED))


def _batches(missing: Mapping[FusedBlock, list[FusedBlock]]) -> Iterator[tuple[FusedBlock, list[FusedBlock]]]:
    for dense, blocks in missing.items():
        for start in range(0, len(blocks), _TOGETHER):
            yield dense, blocks[start : start + _TOGETHER]


@dataclass(slots=True)
class _Counted:
    """Says before each piece of work how many blocks are priced already."""

    progress: Progress
    total: int
    done: int = 0

    def stage(self, text: str) -> None:
        """Announce a piece of work."""
        self.progress.stage(f"{self.done} of {self.total} forms priced: {text}")

    def step(self, done: int, total: int) -> None:
        """Pass it on."""
        self.progress.step(done, total)
