"""inception: a 1x1 convolution and the grouped convolution after it as towers that are concatenated, one per group.

Each tower makes its channels of the whole input with its own 1x1 convolution and filters them, as the towers of an
Inception module do; with a tower per channel this is the "extreme Inception" of Xception (Chollet, 2017, figure 4).
The 1x1 convolution's rows are dealt out to the towers.
"""

from __future__ import annotations

from dataclasses import replace

from sepdeploy.schemes.lowerings.group_towers import split_factor
from sepdeploy.schemes.lowerings.lowering import Refusal
from sepdeploy.schemes.lowerings.span_rewrite import (
    Span,
    SpanRewrite,
    factor_of,
    is_pointwise_kernel,
    kernel_of,
    neighbour,
    shuffled_order,
    weight_of,
)
from sepdeploy.schemes.weighted import WeightedChain, factor_stage, towers

__all__ = ["INCEPTION"]


def _towers(chain: WeightedChain, index: int) -> Span | Refusal | None:
    before = neighbour(chain, index, -1)
    reduce, filtered = factor_of(chain, before), factor_of(chain, index)
    if before is None or filtered is None or filtered.groups == 1 or reduce is None or not is_pointwise_kernel(reduce):
        return None
    split = split_factor(chain[index], filtered)
    if isinstance(split, Refusal):
        return split
    kernel = kernel_of(chain[before:index]).to(weight_of(chain[before]).dtype)
    order = shuffled_order(chain[before + 1 : index], reduce.out_channels)
    bias = chain[before].bias
    branches = []
    for channels, conv in split:
        narrow = replace(reduce, out_channels=channels.out_channels, groups=1, pads_groups=False)
        rows = slice(channels.start, channels.stop)
        branches.append((factor_stage(narrow, kernel[rows], None if bias is None else bias[order[rows]]), conv))
    return before, index + 1, (towers(tuple(branches), "concat"),)


INCEPTION = SpanRewrite(
    "inception",
    "a 1x1 convolution and the grouped convolution after it as towers, each with its own rows of the 1x1",
    _towers,
    Refusal.NOT_POINTWISE_THEN_GROUPED,
)
