"""fold_shuffle: a channel shuffle and a 1x1 convolution next to it as one dense 1x1 convolution.

A shuffle is a permutation matrix: it permutes the columns of the kernel after it, or the rows of the kernel before it.
No shuffle is left to run, for more multiply-accumulates if the convolution was grouped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from sepdeploy.core.chain import Factor, Shuffle
from sepdeploy.schemes.lowerings.lowering import Refusal
from sepdeploy.schemes.lowerings.span_rewrite import (
    Span,
    SpanRewrite,
    factor_of,
    kernel_of,
    shuffled_order,
    weight_of,
)
from sepdeploy.schemes.weighted import WeightedChain, factor_stage

__all__ = ["FOLD_SHUFFLE"]


def _fold(chain: WeightedChain, index: int) -> Span | Refusal | None:
    stage = chain[index].stage
    if not isinstance(stage, Shuffle):
        return None
    beside = [i for i in (index + 1, index - 1) if 0 <= i < len(chain)]
    # A convolution that is dense already costs nothing more; else the one after the shuffle.
    found = [(factor.groups > 1, place, factor) for place, factor in _pointwise(chain, beside)]
    if not found:
        return Refusal.SHUFFLE_BETWEEN_KERNELS
    _, place, factor = min(found, key=lambda each: each[0])
    start = min(place, index)
    weight = kernel_of(chain[start : start + 2]).to(weight_of(chain[place]).dtype)
    bias = chain[place].bias
    if place < index and bias is not None:
        bias = bias[shuffled_order((chain[index],), factor.out_channels)]
    return start, start + 2, (factor_stage(replace(factor, groups=1, pads_groups=False), weight, bias),)


def _pointwise(chain: WeightedChain, places: list[int]) -> Iterator[tuple[int, Factor]]:
    for place in places:
        factor = factor_of(chain, place)
        if factor is not None and factor.kernel_size == (1, 1):
            yield place, factor


FOLD_SHUFFLE = SpanRewrite(
    "fold_shuffle", "a channel shuffle and the 1x1 convolution next to it as one dense 1x1", _fold, Refusal.NO_SHUFFLE
)
