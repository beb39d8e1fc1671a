"""block_diagonal and extract_groups: a grouped convolution as a dense one with zeros, and back."""

from __future__ import annotations

from dataclasses import replace

import torch

from sepdeploy.schemes.kernels import dense_kernel, input_channels
from sepdeploy.schemes.lowerings.lowering import Refusal
from sepdeploy.schemes.lowerings.span_rewrite import Span, SpanRewrite, factor_of, weight_of
from sepdeploy.schemes.weighted import WeightedChain, factor_stage

__all__ = ["BLOCK_DIAGONAL", "EXTRACT_GROUPS"]


def _fill(chain: WeightedChain, index: int) -> Span | None:
    factor = factor_of(chain, index)
    if factor is None or factor.groups == 1:
        return None
    dense = replace(factor, groups=1, pads_groups=False)
    conv = factor_stage(dense, dense_kernel(weight_of(chain[index]), factor), chain[index].bias)
    return index, index + 1, (conv,)


def _extract(chain: WeightedChain, index: int) -> Span | None:
    """The most groups, even or uneven, else padded, outside of which all weights are zero."""
    factor = factor_of(chain, index)
    if factor is None:
        return None
    dense = dense_kernel(weight_of(chain[index]), factor)
    with_zero = torch.cat([dense, torch.zeros_like(dense[:, :1])], 1)
    is_used = (with_zero != 0).flatten(2).any(2)
    widest = int(is_used.sum(1).max())
    for groups in range(min(factor.in_channels, factor.out_channels), factor.groups, -1):
        if -(-factor.in_channels // groups) < widest:
            continue  # no group could hold the fullest row; trying would take minutes for thousands of channels
        for pads_groups in (False, True):
            grouped = replace(factor, groups=groups, pads_groups=pads_groups)
            if 0 in grouped.in_groups + grouped.out_groups:
                continue
            rows, columns = torch.arange(factor.out_channels)[:, None], input_channels(grouped)
            if not bool(is_used.index_put((rows, columns), torch.tensor(False)).any()):
                conv = factor_stage(grouped, with_zero[rows, columns], chain[index].bias)
                return index, index + 1, (conv,)
    return None


BLOCK_DIAGONAL = SpanRewrite(
    "block_diagonal", "a grouped convolution as a dense one with zeros between the groups", _fill, Refusal.NOT_GROUPED
)
EXTRACT_GROUPS = SpanRewrite(
    "extract_groups", "a kernel of diagonal blocks as a grouped convolution", _extract, Refusal.NO_ZERO_BLOCKS
)
